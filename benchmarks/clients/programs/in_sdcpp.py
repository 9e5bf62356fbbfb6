"""Draw with a checkpoint and adapters in stable-diffusion.cpp, on the trained grid.

The argument is a JSON object; the last line printed is another one.
"""

import ctypes
import importlib.metadata
import json
import re
import sys

import stable_diffusion_cpp
from stable_diffusion_cpp import stable_diffusion_cpp as library

SAID = []


@library.sd_log_callback
def hear(level, text, data):
    del level, data
    SAID.append(text.decode("utf-8", "replace"))
    print(SAID[-1], end="", file=sys.stderr)


def main(given):
    model = stable_diffusion_cpp.StableDiffusion(
        model_path=given["single"],
        lora_model_dir=given["export"],
        rng_type="cpu",  # PyTorch's numbers
        sampler_rng_type="cpu",
    )
    library.sd_set_log_callback(hear, ctypes.c_void_p(0))
    name = given["file"].rsplit("/", 1)[-1].removesuffix(".safetensors")
    image = model.generate_image(
        prompt=f"<lora:{name}:1>{given['prompt']}",
        cfg_scale=1.0,
        sample_method="euler",
        sigmas=given["sigmas"],
        sample_steps=given["steps"],
        width=given["size"],
        height=given["size"],
        seed=given["seed"],
    )[0]
    image.save(given["image"])
    applied = re.findall(r"\((\d+) / (\d+)\) LoRA tensors", "".join(SAID))
    ignored = [f"of {all_} tensors it takes {taken}" for taken, all_ in applied if taken != all_]
    print(
        json.dumps(
            {
                "version": importlib.metadata.version("stable-diffusion-cpp-python"),
                "ignored": ignored if applied else ["it says of no tensor that it takes it"],
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
