"""Load an export with ComfyUI's loaders and compare its weights.

The argument is a JSON object; the last line printed is another one.
"""

import json
import logging
import re
import sys

import deltas


class Said(logging.Handler):
    """Keep what ComfyUI says of keys that it does not know."""

    def __init__(self):
        super().__init__()
        self.ignored = []

    def emit(self, record):
        text = record.getMessage()
        if found := re.match(r"left over keys in diffusion model: (.*)", text):
            self.ignored += [] if found[1] == "[]" else [found[1]]
        elif re.match(r"lora key not loaded|NOT LOADED|unet missing|unet unexpected", text):
            self.ignored.append(text)


def weights(model):
    """Yield the names and values of the network's matrices and kernels, with what is added."""
    import comfy.lora

    for key, weight in model.model.state_dict().items():
        if key.startswith("diffusion_model.") and key.endswith(".weight"):
            weight = weight.float()
            if key in model.patches:
                weight = comfy.lora.calculate_weight(model.patches[key], weight.clone(), key)
            yield key, weight.numpy()


def main(given):
    sys.path.insert(0, given["client"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd
    import comfy.utils
    import comfyui_version
    import torch

    said = Said()
    logging.getLogger().addHandler(said)
    logging.getLogger().setLevel(logging.INFO)
    # As in the file: half the memory, and the sums are in float32 all the same.
    kept = {"dtype": torch.float16}
    found = deltas.Deltas(given["base"], given["adapters"])
    if given["form"] == "diffusers":
        model = comfy.sd.load_diffusion_model(given["base"], model_options=kept)
        for key, weight in weights(model):
            found.find(key, weight)
        del model
        model = comfy.sd.load_diffusion_model(given["file"])
    else:
        model = comfy.sd.load_checkpoint_guess_config(
            given["single"], output_clip=False, output_vae=False, model_options=kept
        )[0]
        for key, weight in weights(model):
            found.find(key, weight)
        lora = comfy.utils.load_torch_file(given["file"], safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    for key, weight in weights(model):
        found.take(key, weight)
    print(
        json.dumps(
            found.result()
            | {
                "version": comfyui_version.__version__,
                "keys": len(deltas.keys(given["file"])),
                "ignored": said.ignored,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
