"""Merge adapters into a checkpoint with sd-scripts' own functions and compare the weights.

The argument is a JSON object; the last line printed is another one.
"""

import json
import logging
import sys

import deltas


class Said(logging.Handler):
    """Keep what sd-scripts says of adapters that it has no module for."""

    def __init__(self):
        super().__init__()
        self.ignored = []

    def emit(self, record):
        if record.getMessage().startswith("no module found for LoRA weight"):
            self.ignored.append(record.getMessage())


def main(given):
    sys.path[:0] = [f"{given['client']}/networks", given["client"]]
    import torch

    found, said, merged = deltas.Deltas(given["base"], given["adapters"]), Said(), torch.float32
    if given["family"] == "sdxl":
        import sdxl_merge_lora as merge_lora
        from library import sdxl_model_util

        *encoders, _, unet, _, _ = sdxl_model_util.load_models_from_sdxl_checkpoint(
            sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0, given["single"], "cpu"
        )
        more = [[], merged]
    else:
        import merge_lora
        from library import model_util

        encoder, _, unet = model_util.load_models_from_stable_diffusion_checkpoint(
            False, given["single"]
        )
        encoders, more = [encoder], [merged]
    for key, weight in unet.state_dict().items():
        found.find(key, weight.numpy())
    merge_lora.logger.addHandler(said)
    merge_lora.logger.setLevel(logging.INFO)
    merge_lora.merge_to_sd_model(*encoders, unet, [given["file"]], [1.0], *more)
    for key, weight in unet.state_dict().items():
        found.take(key, weight.numpy())
    keys = len(deltas.keys(given["file"]))
    print(json.dumps(found.result() | {"keys": keys, "ignored": said.ignored}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
