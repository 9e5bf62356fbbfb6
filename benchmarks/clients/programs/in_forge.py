"""Load a checkpoint and adapters with Forge's own functions and compare the weights.

The argument is a JSON object; the last line printed is another one.
"""

import json
import sys

import deltas


def load(checkpoint):
    """Return Forge's UNet of a checkpoint, in a patcher.

    Its own loader also imports the interface, which takes much else.
    """
    import diffusers
    import huggingface_guess
    from backend import memory_management, operations, state_dict, utils
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.patcher.unet import UnetPatcher

    tensors = utils.load_torch_file(checkpoint)
    guess = huggingface_guess.guess(tensors)
    weights = state_dict.try_filter_state_dict(tensors, guess.unet_key_prefix)
    dtype = memory_management.state_dict_dtype(weights)
    with operations.using_forge_operations(device=memory_management.cpu, dtype=dtype):
        unet = IntegratedUNet2DConditionModel.from_config(guess.unet_config)
    state_dict.load_state_dict(unet, weights)
    unet._internal_dict = guess.unet_config
    unet.storage_dtype = unet.computation_dtype = dtype
    unet.load_device = unet.initial_device = unet.offload_device = memory_management.cpu
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    return UnetPatcher.from_model(unet, scheduler, guess)


def main(given):
    client = given["client"]
    # The folders that Forge's launcher adds.
    sys.path[:0] = [
        client,
        f"{client}/packages_3rdparty",
        f"{client}/repositories/huggingface_guess",
    ]
    sys.argv = [sys.argv[0], "--always-cpu"]  # which its modules read
    from backend import utils
    from backend.patcher import lora

    found = deltas.Deltas(given["base"], given["adapters"])
    unet = load(given["single"])
    patches, ignored = lora.load_lora(
        utils.load_torch_file(given["file"], safe_load=True),
        lora.model_lora_keys_unet(unet.model, {}),
    )
    loaded = unet.add_patches(filename=given["file"], patches=patches)
    (added,) = unet.lora_patches.values()
    for key, weight in unet.model.state_dict().items():
        if key.endswith(".weight"):
            weight = weight.float()
            found.find(key, weight.numpy())
            if key in added:
                weight = lora.merge_lora_to_weight(added[key], weight, key)
            found.take(key, weight.numpy())
    ignored = [*map(str, ignored), *(str(key) for key in patches if key not in loaded)]
    keys = len(deltas.keys(given["file"]))
    print(json.dumps(found.result() | {"keys": keys, "ignored": ignored}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
