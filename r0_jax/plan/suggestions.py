"""What would make a program fit: the cheapest first, with the bytes that each saves a chip.

`kinds` are the bytes of a chip at the worst moment; `over`, how many of them are too many.
"""

from r0_jax.evaluation.batches import batch_size
from r0_jax.parallel import sharding
from r0_jax.plan.flops import repeated
from r0_jax.plan.memory import bytes_by_kind, held
from r0_jax.training.program import Program

_GIB = 2**30
# What to do, and the bytes that it saves; None where nobody knows.
_Found = list[tuple[str, float | None]]


def for_step(built: Program, kinds: dict[str, float], over: float) -> list[str]:
    """Return what would make the training step fit."""
    config, found = built.config, _split_weights(built, kinds)
    if config.remat != "blocks":
        found.append(("--config.remat=blocks", None))
    share = config.batch_size // sharding.batch_parts(built.mesh)
    if (at_once := min(config.device_batch or share, share)) > 1:
        found.append(("--config.device_batch=1", kinds["activations"] * (1 - 1 / at_once)))
    found += _encode_prompts(built, kinds)
    if not config.objective.decoder:
        found.append(("--config.objective.decoder=PATH of a tiny autoencoder (TAESD)", None))
    found += _train_adapters(built, kinds)
    slices, fsdp, tensor = _sizes(built)
    if tensor == share == 1 and fsdp % 2 == 0:
        devices = list(built.mesh.devices.flat)
        pairs = sharding.make_mesh({"data": slices, "fsdp": fsdp // 2, "tensor": 2}, devices)
        if repeated(built.changed(mesh=pairs)) == 1:
            found.append(
                (
                    f"two chips a sample (--config.mesh.data={slices} --config.mesh.fsdp="
                    f"{fsdp // 2} --config.mesh.tensor=2 --config.device_batch=1)",
                    None,
                )
            )
    return _lines(found, over)


def for_term_norms(built: Program, kinds: dict[str, float], over: float) -> list[str]:
    """Return what would make the gradients of each term alone fit: to do without, or as a step."""
    return ["--config.eval.term_norms=False", *for_step(built, kinds, over)]


def for_evaluation(built: Program, kinds: dict[str, float], over: float, batch: int) -> list[str]:
    """Return what would make a program of the evaluations fit, which works on `batch` images."""
    found = _draw_fewer(kinds, batch // sharding.batch_parts(built.mesh))
    found += _split_weights(built, kinds)
    found += _encode_prompts(built, kinds)
    found += [(f"no reward {kind}", kinds[kind]) for kind in kinds if kind.startswith("held-out")]
    return _lines(found + _train_adapters(built, kinds), over)


def for_table(built: Program, kinds: dict[str, float], over: float) -> list[str]:
    """Return what would make a program of the table fit; its weights are never split."""
    config, chips = built.config, built.mesh.size
    mesh = sharding.make_mesh({"data": -1}, list(built.mesh.devices.flat))
    found = _draw_fewer(kinds, batch_size(config, config.test.num_prompts, mesh) // chips)
    found += _encode_prompts(built, kinds)
    found.append(("--config.test.prompts= and r0_jax.evaluate on larger chips", None))
    return _lines(found, over)


def _split_weights(built: Program, kinds: dict[str, float]) -> _Found:
    slices, fsdp, tensor = _sizes(built)
    if built.mesh.shape["fsdp"] >= fsdp or built.config.batch_size % (slices * fsdp):
        return []
    devices = list(built.mesh.devices.flat)
    whole = sharding.make_mesh({"data": slices, "fsdp": fsdp, "tensor": tensor}, devices)
    split = bytes_by_kind(held(built.changed(mesh=whole)))
    saved = sum(kinds[kind] - size for kind, size in split.items())
    return [(f"--config.mesh.data={slices} --config.mesh.fsdp={fsdp}", saved)]


def _sizes(built: Program) -> tuple[int, int, int]:
    """Return the slices, the most chips over which fsdp can split weights, and `tensor`."""
    devices = list(built.mesh.devices.flat)
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # fsdp stays in one
    tensor = built.mesh.shape["tensor"]
    return slices, built.mesh.size // slices // tensor, tensor


def _draw_fewer(kinds: dict[str, float], share: int) -> _Found:
    """Return how to draw one image at a time on a device that draws `share` of them."""
    saved = kinds["activations"] * (1 - 1 / max(share, 1))
    return [("--config.draw_batch=1", saved)] if share > 1 else []


def _encode_prompts(built: Program, kinds: dict[str, float]) -> _Found:
    if built.config.data.encoded:
        return []
    text = sum(size for kind, size in kinds.items() if "text_encoder" in kind)
    return [("prompts encoded before (r0_jax.encode_prompts)", text)]


def _train_adapters(built: Program, kinds: dict[str, float]) -> _Found:
    if built.config.lora.rank:
        return []
    saved = kinds["parameters"] + kinds["ema"] + kinds["optimizer"]
    return [("adapters instead of all weights (--config.lora.rank=32)", saved)]


def _lines(found: _Found, over: float) -> list[str]:
    return [
        what if saved is None else f"{what}: {saved / _GIB:.1f} GiB of {over / _GIB:.1f}"
        for what, saved in found
    ]
