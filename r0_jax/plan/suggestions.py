"""What would make a config fit."""

from ml_collections import ConfigDict

from r0_jax.parallel import sharding
from r0_jax.plan.flops import repeated
from r0_jax.plan.memory import bytes_by_kind
from r0_jax.training.program import Program

_GIB = 2**30


def suggest(config: ConfigDict, built: Program, kinds: dict[str, float], over: float) -> list[str]:
    """Return what would make it fit, the cheapest first, with the bytes that each saves a chip.

    `kinds` are the bytes of a chip at the worst moment; `over`, how many of them are too many.
    """
    chips = built.mesh.size
    found = []
    devices = list(built.mesh.devices.flat)
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # fsdp stays in one
    tensor = built.mesh.shape["tensor"]
    fsdp = chips // slices // tensor
    if built.mesh.shape["fsdp"] < fsdp and config.batch_size % (slices * fsdp) == 0:
        whole = sharding.make_mesh({"data": slices, "fsdp": fsdp, "tensor": tensor}, devices)
        split = bytes_by_kind(built.changed(mesh=whole))
        found.append(
            (
                f"--config.mesh.data={slices} --config.mesh.fsdp={fsdp}",
                sum(kinds[kind] - size for kind, size in split.items()),
            )
        )
    if config.remat != "blocks":
        found.append(("--config.remat=blocks", None))
    share = config.batch_size // sharding.batch_parts(built.mesh)
    if (at_once := min(config.device_batch or share, share)) > 1:
        found.append(("--config.device_batch=1", kinds["activations"] * (1 - 1 / at_once)))
    if not config.data.encoded:
        text = sum(size for kind, size in kinds.items() if kind.startswith("frozen text"))
        found.append(("prompts encoded before (r0_jax.encode_prompts)", text))
    if not config.objective.decoder:
        found.append(("--config.objective.decoder=PATH of a tiny autoencoder (TAESD)", None))
    if not config.lora.rank:
        found.append(
            (
                "adapters instead of all weights (--config.lora.rank=32)",
                kinds["parameters"] + kinds["ema"] + kinds["optimizer"],
            )
        )
    if tensor == share == 1 and fsdp % 2 == 0:
        pairs = sharding.make_mesh({"data": slices, "fsdp": fsdp // 2, "tensor": 2}, devices)
        if repeated(built.changed(mesh=pairs)) == 1:
            found.append(
                (
                    f"two chips a sample (--config.mesh.data={slices} --config.mesh.fsdp="
                    f"{fsdp // 2} --config.mesh.tensor=2 --config.device_batch=1)",
                    None,
                )
            )
    return [
        what if saved is None else f"{what}: {saved / _GIB:.1f} GiB of {over / _GIB:.1f}"
        for what, saved in found
    ]
