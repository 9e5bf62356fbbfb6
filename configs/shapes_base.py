"""How the embedded world's models were made: the pipeline and the rewards of shapes_r0.py.

Commands, in this order (each stage needs those before it; --out=DIR writes elsewhere):

    export XLA_FLAGS=--xla_force_host_platform_device_count=2     # one device a core: 1.4 x faster
    for stage in tokenizer vae text_encoder unet decoder clip heldout_clip preference aesthetic; do
      python -m r0_jax.pretrain --config=configs/shapes_base.py:$stage
    done

Hardware:  2 CPU cores, 4 GiB. docs/world.md gives the minutes and the measured quality.
"""

from ml_collections import ConfigDict

MAX_TOKENS = 32  # the longest caption has 17; a third of the cost of CLIP's 77


def get_config(stage: str) -> ConfigDict:
    config = {
        "tokenizer": tokenizer,
        "vae": vae,
        "text_encoder": text_encoder,
        "unet": unet,
        "decoder": decoder,
        "clip": clip,
        "heldout_clip": heldout_clip,
        "preference": preference,
        "aesthetic": aesthetic,
    }.get(stage, ConfigDict)()
    config.stage = stage
    return config.lock()


def training(**fields) -> ConfigDict:
    """What every trained stage has."""
    return ConfigDict(
        {
            "seed": 0,
            # Optimizer steps and samples a step.
            "steps": 1000,
            "batch_size": 64,
            # AdamW with linear warm-up and cosine decay; b1 is 0.9.
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "b2": 0.99,
            "weight_decay": 0.0,
            # Gradients are scaled down to this global norm.
            "clip_norm": 1.0,
            # Decay of the average of the weights, which is what gets written.
            "ema_decay": 0.999,
            # Steps between printed lines, and between evaluations where the stage has one.
            "log_every": 50,
            "eval_every": 1000,
            # Start from the weights that are in the folder (a further leg) instead of random ones.
            "warm_start": False,
            # Of the weights on disk.
            "store_dtype": "float16",
            **fields,
        }
    )


def tokenizer() -> ConfigDict:
    return ConfigDict({"model_max_length": MAX_TOKENS})


def vae() -> ConfigDict:
    """64 px -> 8 x 8 x 16 latents."""
    levels = 4
    return training(
        steps=2400,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=50,
        ema_decay=0.99,
        # Of the Kullback-Leibler divergence from N(0, I), a mean over latent numbers.
        kl_weight=1e-4,
        # Of the error at pixels on an outline.
        outline_weight=5.0,
        network={
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": [8, 32, 64, 64],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "sample_size": 64,
        },
    )


def text_encoder() -> ConfigDict:
    """Taught to name what a caption says; frozen from then on."""
    return training(
        seed=6,
        steps=1500,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,
        # As transformers will compute, beside a UNet that diffusers loads in float32 anyway.
        store_dtype="float32",
        network={
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_TOKENS,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 128,
        },
    )


def unet() -> ConfigDict:
    """The denoising network, v-prediction."""
    return training(
        seed=3,
        steps=9000,
        weight_decay=0.01,
        log_every=100,
        # Scenes rendered, encoded and kept; each has 6 captions.
        scenes=24576,
        # Share of captions replaced by the empty one, for classifier-free guidance.
        prompt_dropout=0.1,
        # Of the evaluations on validation prompts, 25 steps each.
        guidance_scale=3.0,
        eval_prompts=128,
        network={
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": [2, 4],
            "block_out_channels": [64, 128],
            "center_input_sample": False,
            "cross_attention_dim": 128,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 16,
            "layers_per_block": 1,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-5,
            "norm_num_groups": 16,
            "out_channels": 16,
            "sample_size": 8,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "use_linear_projection": True,
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "trailing",
        },
        model_index={
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def decoder() -> ConfigDict:
    """The VAE's decoder, on what the UNet predicts at timesteps below `latest_timestep`."""
    return training(
        seed=8,
        steps=1000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=50,
        ema_decay=0.99,
        outline_weight=5.0,
        latest_timestep=500,
        clean_share=0.2,
    )


def clip() -> ConfigDict:
    """The reward of prompt agreement; what `preference` starts from."""
    return contrastive(
        "clip", seed=1, vision=tower(128, 3, 2, image_size=48, patch_size=8), text=tower(96, 3, 2)
    )


def heldout_clip() -> ConfigDict:
    """The judge that never trains anything: another size, seed and resolution."""
    return contrastive(
        "heldout_clip",
        seed=2,
        vision=tower(96, 4, 3, image_size=64, patch_size=8),
        text=tower(80, 3, 2),
    )


def contrastive(name: str, seed: int, vision: dict, text: dict) -> ConfigDict:
    return training(
        name=name,
        seed=seed,
        steps=1500,
        batch_size=128,
        b2=0.98,
        weight_decay=0.05,
        ema_decay=0.995,
        # Images are degraded up to this level, mostly less, so that noise and blur do not fool it.
        augmentation=0.6,
        network={
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 96,
            "logit_scale_init_value": 2.6592,
            "text_config": {
                "model_type": "clip_text_model",
                "max_position_embeddings": MAX_TOKENS,
                **text,
            },
            "vision_config": {"model_type": "clip_vision_model", "num_channels": 3, **vision},
        },
    )


def tower(width: int, layers: int, heads: int, **fields) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 96,
        **fields,
    }


def preference() -> ConfigDict:
    """HPS's way: CLIP taught by pairs. At the images' own size, to see outlines."""
    return training(
        name="preference",
        seed=4,
        steps=2500,
        learning_rate=5e-4,
        warmup_steps=50,
        b2=0.98,
        weight_decay=0.05,
        ema_decay=0.99,
        image_size=64,
        # Pairs that are drawn once: batches of 64 for each way to draw the worse image.
        kept_batches=8,
        few_steps=(2, 4, 8),
    )


def aesthetic() -> ConfigDict:
    return training(
        name="aesthetic",
        seed=5,
        steps=1500,
        learning_rate=1e-3,
        warmup_steps=50,
        ema_decay=0.99,
        few_step_images=1536,
        few_steps=(2, 4, 8),
    )
