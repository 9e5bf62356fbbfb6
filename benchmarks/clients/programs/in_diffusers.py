"""Load an export with stock diffusers, compare its weights, and draw an image.

The argument is a JSON object; the last line printed is another one.
"""

import json
import logging
import sys

import deltas
import diffusers
import torch
import transformers

PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


class Unknown(logging.Handler):
    """Keep what diffusers says of keys that it does not know."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        said = record.getMessage()
        # The first is said of every LoRA without a text encoder's part, whatever the file holds.
        if "unexpected" in said.lower() and not said.startswith("No LoRA keys associated to "):
            self.said.append(said)


def load(given):
    """Return the pipeline of the export, or the pretrained one where the export is adapters."""
    options = dict(given["options"])
    if given["tokenizer"]:  # of another client, for the same tokens
        for name in given["tokenizers"]:
            options[name] = transformers.CLIPTokenizer.from_pretrained(
                given["tokenizer"], pad_token=PADDING[name], model_max_length=77
            )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        given["pipeline"], torch_dtype=torch.float32, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_adapters(pipeline, given):
    """Add the adapters to the weights, and take the scheduler that lies beside them."""
    pipeline.load_lora_weights(given["export"], weight_name=given["file"].rsplit("/", 1)[-1])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    with open(f"{given['export']}/scheduler_config.json", encoding="utf-8") as file:
        fields = json.load(file)
    pipeline.scheduler = getattr(diffusers, fields["_class_name"]).from_config(fields)


def read(pipeline, given):
    """Return the prompt as an argument of the pipeline.

    "first_tokens" leaves these alone: SD3 without T5 has zeros behind, which ComfyUI leaves out.
    """
    if not given["first_tokens"]:
        return {"prompt": given["prompt"]}
    tokens, _, pooled, _ = pipeline.encode_prompt(
        given["prompt"], None, None, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": tokens[:, : given["first_tokens"]], "pooled_prompt_embeds": pooled}


def draw(pipeline, given):
    noise = torch.randn(given["noise_shape"], generator=torch.manual_seed(given["seed"]))
    image = pipeline(
        **read(pipeline, given),
        num_inference_steps=given["steps"],
        guidance_scale=1,
        latents=noise,
        height=given["size"],
        width=given["size"],
    ).images[0]
    image.save(given["image"])


def main(given):
    unknown = Unknown()
    logging.getLogger("diffusers").addHandler(unknown)
    found = deltas.Deltas(given["base"], given["adapters"])
    for key, weight in deltas.tensors(given["base"]):
        found.find(key, weight)
    pipeline = load(given)
    network = getattr(pipeline, given["part"])
    if given["form"] == "diffusers":
        names = set(network.state_dict())
        unknown.said += sorted(names.symmetric_difference(deltas.keys(given["file"])))
    else:
        add_adapters(pipeline, given)
    for key, weight in network.state_dict().items():
        found.take(key, weight.numpy())
    draw(pipeline, given)
    print(
        json.dumps(
            found.result()
            | {
                "version": diffusers.__version__,
                "keys": len(deltas.keys(given["file"])),
                "ignored": unknown.said,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
