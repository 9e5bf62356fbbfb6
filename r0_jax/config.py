"""The base of all recipes, with every field explained. A recipe overrides a few fields.

The command line changes fields as `--config.field=value`; an unknown one is an error. A
relative path begins in the folder where the command runs, and `~` is the home folder. Paths may
also be in gs:// or s3:// (docs/remote_paths.md).
"""

from ml_collections import ConfigDict

from r0_jax import paths

# Queries, keys, values and the first layer of a feed-forward are split by their outputs. The layer
# that follows is split by its inputs, so what is between them never leaves its device. Of an
# adapter only the factor at the split side is split.
TENSOR_PARALLEL = (
    # T5.
    (r".*\.SelfAttention\.([qkv]\.kernel|relative_attention_bias\.embedding)", "column"),
    (r".*\.SelfAttention\.o\.kernel", "row"),
    (r".*\.DenseReluDense\.wi(_[01])?\.kernel", "column"),
    (r".*\.DenseReluDense\.wo\.kernel", "row"),
    # Stable Diffusion 3's transformer; UNets say down_blocks... first.
    (
        r"transformer_blocks\..*\.attn2?\.(to_[qkv]|add_[qkv]_proj)(\.lora_B)?\.(kernel|bias)",
        "column",
    ),
    (r"transformer_blocks\..*\.attn2?\.(to_out\.0|to_add_out)(\.lora_A)?\.kernel", "row"),
    (r"transformer_blocks\..*\.ff(_context)?\.net\.0\.proj(\.lora_B)?\.(kernel|bias)", "column"),
    (r"transformer_blocks\..*\.ff(_context)?\.net\.2(\.lora_A)?\.kernel", "row"),
    # Qwen3. The heads of keys and values are split, each with the queries that share it.
    (r"model\.layers\..*\.self_attn\.[qkv]_proj\.kernel", "column"),
    (r"model\.layers\..*\.self_attn\.o_proj\.kernel", "row"),
    (r"model\.layers\..*\.mlp\.(gate|up)_proj\.kernel", "column"),
    (r"model\.layers\..*\.mlp\.down_proj\.kernel", "row"),
    # Z-Image's transformer.
    (r"(layers|\w+_refiner)\..*\.attention\.to_[qkv](\.lora_B)?\.kernel", "column"),
    (r"(layers|\w+_refiner)\..*\.attention\.to_out\.0(\.lora_A)?\.kernel", "row"),
    (r"(layers|\w+_refiner)\..*\.feed_forward\.w[13](\.lora_B)?\.kernel", "column"),
    (r"(layers|\w+_refiner)\..*\.feed_forward\.w2(\.lora_A)?\.kernel", "row"),
)
MOST_GUIDANCE = 1000  # of any guidance scale; published ones are at most 20
# Fields that hold a path, besides `path` and `head` of each reward's entry.
PATHS = (
    "pretrained",
    "data.prompts",
    "data.encoded",
    "objective.decoder",
    "compilation_cache",
    "eval.prompts",
    "test.prompts",
)


def get_config() -> ConfigDict:
    """Return all fields with their defaults, locked: a typing error cannot add a field."""
    config = ConfigDict()

    # The diffusers folder of the pretrained pipeline (it holds model_index.json).
    config.pretrained = ""
    # The diffusers class of this folder: StableDiffusionPipeline, StableDiffusionXLPipeline,
    # StableDiffusion3Pipeline or ZImagePipeline. Another one is an error; "" takes any of them.
    config.family = ""
    # The dtype of frozen weights and of the networks' arithmetic: "float32", or "bfloat16" on
    # accelerators. Trained parameters, norms, softmax and the sampler's arithmetic stay float32.
    config.dtype = "float32"
    # The program of attention. "xla" works anywhere, "cudnn" on NVIDIA GPUs in bfloat16, "splash"
    # on TPUs; "auto" takes the one that suits the machine. cudnn and splash never hold the weights
    # of all pairs of pixels. Layers that they do not support, such as the VAE's under cudnn, use
    # xla. So do the reward models.
    config.attention = "xla"
    # What the backward pass computes again to save memory. "blocks": each resnet and transformer
    # block from its input, the least memory. "calls": each call of the generator from its input;
    # the activations of one call are held at once. "none": nothing, for small networks.
    config.remat = "calls"
    # Compile identical blocks that follow each other once, as a loop. Large networks compile
    # several times faster and run about as fast. Small ones run slower on CPU.
    config.scan_blocks = False
    # Pixels of the images; 0: the size that the pretrained generator's config says, or 1024 for
    # Z-Image. Multiples of 8, or of 16 for SD3 and Z-Image. Images need not be square.
    config.height = 0
    config.width = 0
    # Seed of everything random: adapters, the order of prompts, noise, eta.
    config.seed = 0

    # Training steps (optimizer updates) of the whole run.
    config.steps = 1000
    # Samples of a step, over all devices and microbatches.
    config.batch_size = 32
    # Samples that a device computes at once; 0: all of its share. A larger share is cut into
    # microbatches. Their gradients are averaged, which equals the large batch exactly.
    config.device_batch = 0
    # Images that a device draws and scores at once, in evaluations and for the table. 0: as many as
    # the training step holds there (device_batch, or the device's share of batch_size).
    config.draw_batch = 0
    # Decay of the average of the trained parameters that is evaluated and exported.
    config.ema_decay = 0.99
    # The run stops when this many steps in a row had gradients that are not finite.
    config.max_skipped_in_a_row = 10

    config.data = ConfigDict()
    # Training prompts: a .txt (one a line), .jsonl, .json or .parquet file or a tfds folder.
    config.data.prompts = ""
    # A folder of encoded prompts, made by `r0_jax.encode_prompts` or from embeddings of your own
    # (docs/prompts.md). It holds the prompts of training, eval and test, and the rewards' features.
    # Training, evaluation and the table then need no text encoder. data.prompts may be ""; if it is
    # set, the prompts must be the same. "" encodes prompts while training.
    config.data.encoded = ""

    config.sampler = ConfigDict()
    # Steps of the generator, at most 50. It is trained on the grid that a stock sampler with
    # trailing spacing visits in that number of steps. R0 takes at most 4; relatives that keep many
    # steps, such as ReFL and DRaFT, take more.
    config.sampler.num_steps = 4
    # Classifier-free guidance of each step, in training, evaluations, samples and exports. 1 is
    # none: a step calls the network once. Above 1 a step calls it with and without the prompt.
    config.sampler.guidance_scale = 1.0
    # In training each step of each sample draws eta ~ U[0, 1]. Varied paths work against hacking.
    config.sampler.random_eta = True
    # The share of each step's noise that is drawn anew: 0 as in DDIM and Euler, or 1 as in LCM.
    # Evaluations, samples and exports draw with it; so does training without random_eta. Stock
    # samplers have no share between 0 and 1.
    config.sampler.eta = 0.0

    config.objective = ConfigDict()
    # "r0" rewards the last image, with gradients through the last grad_steps steps. "r0plus"
    # rewards the one-shot prediction of a random step, with a gradient through that step alone.
    # "refl" does so with one of the last late_steps steps. "drtune" rewards the prediction of such
    # a step too; gradients go through the network's outputs, not its inputs, at grad_steps steps
    # that are evenly spaced up to it.
    config.objective.method = "r0"
    # For "r0": how many of the last steps carry a gradient (num_steps: all, as in the paper; fewer:
    # DRaFT-K). For "drtune": how many of all.
    config.objective.grad_steps = 4
    # For "r0": of a sample's gradient, at most this norm flows from a step to the one before. The
    # rewards' pull at x0 has norm 1. Without a bound (0) the gradient of single samples grows from
    # step to step, until they decide for the whole batch.
    config.objective.bound = 1.0
    # For "refl" and "drtune": how many of the last steps may be rewarded.
    config.objective.late_steps = 10
    # For "r0" with grad_steps=1: so many times the last step is also made from its own image under
    # fresh noise, and rewarded (DRaFT-LV takes 2).
    config.objective.noises = 0
    # Folder of a tiny autoencoder, in diffusers' format, that decodes for the rewards in training:
    # TAESD for Stable Diffusion 1.x, TAESDXL for SDXL, TAESD3 for SD3, TAEF1 for Z-Image. "" uses
    # the pipeline's own VAE. Samples and evaluations always use the VAE.
    config.objective.decoder = ""
    # Compile these calls one after the other instead of as a loop, with the same numbers. On CPU
    # the gradient of a loop is many times slower for small networks.
    config.objective.unroll = False
    # What a reward's image gradient is divided by. "per_sample": its own norm; "running_std": the
    # standard deviation of the reward's scores over the last steps; "none": nothing.
    config.objective.normalization = "per_sample"
    # Added to that divisor.
    config.objective.delta = 1e-8
    # "project" removes the part of a reward's gradient that works against another reward's
    # (PCGrad). "keep" adds the gradients as they are.
    config.objective.conflicts = "keep"
    # Rewards' gradients are taken at images so far down their own slope: the root mean square of
    # the change of a pixel in [0, 1]. 0.01 is usual, 0 is off; it costs a second gradient of each
    # reward.
    config.objective.sharpness = 0.0

    # The rewards that training maximizes, {name: entry}; `reward_entry` below has their fields. One
    # of weight 0 is not computed. There may be none, if a regularizer pulls at x0.
    config.rewards = ConfigDict()
    # Rewards that are only measured, on validation prompts, with entries of the same form.
    config.heldout_rewards = ConfigDict()

    # What keeps the generator near its pretrained self. A weight of 0 removes the term from the
    # program. Terms from `output` on, but for `gradient`, pull at x0, in the unit of the rewards:
    # the rewards' combined pull has norm 1 for each sample. N are the latent elements of a sample.
    config.regularizers = ConfigDict()
    # Each update takes learning rate * weight of theta - theta_pretrained away; with LoRA, of the
    # product B A. It is decoupled from Adam, as AdamW's decay is. Usual: 0.01 to 0.1.
    config.regularizers.weight = ConfigDict({"weight": 0.0})
    # Parameter noise sqrt(2 * learning rate * weight) * N(0, 1). Under a clipped optimizer and
    # normalized rewards that is noise, not a sample of a posterior.
    config.regularizers.langevin = ConfigDict({"weight": 0.0})
    # weight * (target - x0) / sqrt(N); the target is the base's one-shot x0 at the same noisy
    # input, with `guided` its guided x0 at guidance `scale`.
    config.regularizers.output = ConfigDict({"weight": 0.0, "guided": False, "scale": 3.0})
    # weight * the descent of the relative distance in the base's mid-block features. The output is
    # noised to a level between `least` and `most`, shares of the trained timesteps.
    config.regularizers.feature = ConfigDict({"weight": 0.0, "least": 0.02, "most": 0.5})
    # A share `weight` (0 to 1) of each reward's gradient becomes its average over `samples` images
    # with noise of standard deviation `std`.
    config.regularizers.gradient = ConfigDict({"weight": 0.0, "samples": 1, "std": 0.05})
    # weight * a pull along classifier-free guidance at `scale`, which the base computes for the
    # output noised to a level between `least` and `most`. With d = x0_prompted - x0_empty and
    # x0_guided = x0_empty + scale d, `form` is "pull": (x0_guided - x0) / sqrt(N); "tdm":
    # (scale - 1) d / (sqrt(N) mean |x0 - x0_guided|), as TDM-R1; or "direction": d / ||d||, for
    # which `scale` has no meaning.
    config.regularizers.guidance = ConfigDict(
        {"weight": 0.0, "form": "pull", "scale": 3.0, "least": 0.02, "most": 0.98}
    )

    # weight * the descent of RG-LCM's consistency distillation loss, at the noisy input of the
    # graded call. The base, guided with w ~ U[least, most] for each sample, goes `skip` lower by
    # one step of DDIM, a share of the trained timesteps. From there the target network predicts
    # x0: the "generator" of this step, or its average ("ema", config.ema_decay). `form` is "huber",
    # of constant c, or "l2". w is one less than the `scale` of the other terms: x0_prompted + w d.
    config.regularizers.consistency = ConfigDict(
        {
            "weight": 0.0,
            "least": 3.0,
            "most": 15.0,
            "skip": 0.02,
            "target": "generator",
            "form": "huber",
            "c": 1e-3,
        }
    )
    # weight * a pull along the difference of two scores: of the base, guided at `scale` (1: not),
    # and of a fake that is trained alongside to denoise what the generator draws (Diff-Instruct++,
    # DMD2). Both see the output, noised to a level between `least` and `most`. `form` is "kl", or
    # "sim": the descent of the scores' squared distance (SiD, Diff-Instruct*), at about twice the
    # cost. The fake is adapters of `rank` on the base, scaled by 1, on the layers `targets`; "" are
    # those of lora.targets. It is updated `updates` times a step: once on the step's own images,
    # then on images drawn anew. Its optimizer is that of the generator, but for b1 and a learning
    # rate that is learning_rate_ratio times as high.
    config.regularizers.score = ConfigDict(
        {
            "weight": 0.0,
            "form": "kl",
            "scale": 1.0,
            "least": 0.02,
            "most": 0.98,
            "rank": 32,
            "targets": "",
            "updates": 1,
            "learning_rate_ratio": 4.0,
            "b1": 0.0,
        }
    )

    config.lora = ConfigDict()
    # Rank of the adapters, at most the smaller side of every layer's matrix. 0 trains all weights
    # of the network instead.
    config.lora.rank = 32
    # Adapters are scaled by alpha / rank.
    config.lora.alpha = 32.0
    # Regular expression on the whole dotted names of the layers that get an adapter.
    config.lora.targets = r".*\.attn[12]\.to_(q|k|v|out\.0)"

    config.optimizer = ConfigDict()
    # The learning rate of AdamW after warm-up.
    config.optimizer.learning_rate = 1e-4
    # Steps of linear warm-up.
    config.optimizer.warmup_steps = 10
    # After warm-up: "constant", or "cosine" down to 0 at `steps`.
    config.optimizer.schedule = "constant"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.eps = 1e-8
    # Decoupled weight decay, on matrices only, as a share of the learning rate.
    config.optimizer.weight_decay = 0.0
    # Gradients are scaled down to this global norm.
    config.optimizer.clip_norm = 1.0

    config.mesh = ConfigDict()
    # Devices on each axis; -1 is the rest. `data` splits the batch, `fsdp` the batch and the
    # weights, `tensor` the heads and the feed-forward layers of a sample. The batch is a multiple
    # of data x fsdp.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    # (regular expression on whole dotted names, strategy); the first match counts. "fsdp" splits
    # over the fsdp axis. "replicate" keeps the whole on every device. "column" and "row" also split
    # the layer's outputs or inputs over the tensor axis, if that divides them and the heads.
    config.sharding = (*TENSOR_PARALLEL, (".*", "fsdp"))

    # For runs of many processes (docs/scale.md). Seconds until all of them must be there.
    config.processes = ConfigDict()
    config.processes.start_timeout = 300
    # The run ends when a process gives no sign of life for this number of seconds. It was killed,
    # its machine is gone, or it is frozen.
    config.processes.lost_timeout = 60
    # The run ends when no process finishes a step, a batch of an evaluation or a checkpoint for
    # this number of seconds: one of them hangs. They must suffice to compile the step, and to fetch
    # one folder of weights.
    config.processes.hang_timeout = 1800

    # Steps between lines of metrics.jsonl, between checkpoints, and between evaluations. Each
    # evaluation is also a checkpoint, so that the best one is kept.
    config.log_every = 1
    config.checkpoint_every = 100
    config.eval_every = 100
    # How many of the newest checkpoints are kept, besides the best one.
    config.keep_checkpoints = 2
    # The metric of the best checkpoint, the higher the better; "" keeps no best one.
    config.best_metric = ""
    # {sign of hacking: (least, most)}, bounds of "hacking/SIGN", which are multiples of what the
    # untrained generator shows on the same noise. A checkpoint outside of them is never the best.
    # Signs: saturation, contrast, edges, dark, colour_entropy, diversity and grid_energy_N.
    config.veto = ConfigDict()
    # Training ends after this number of evaluations in a row without a new best. 0: at `steps`.
    config.early_stop = 0
    # Also log to TensorBoard, in the workdir's folder tensorboard.
    config.tensorboard = True
    # Steps that are traced for TensorBoard's profiler, after the first step of each start, which
    # compiles. 0 traces none. The trace lies in the workdir, in tensorboard/plugins/profile.
    config.profile = 0
    # Also log to Weights & Biases (needs the wandb package).
    config.wandb = False
    # Folder of compiled programs, shared by runs; "" is the user's cache folder.
    config.compilation_cache = ""

    config.eval = ConfigDict()
    # Prompts of the evaluations during training, in any of the formats above. "" takes the training
    # prompts. Only the first num_prompts of them are used.
    config.eval.prompts = ""
    config.eval.num_prompts = 64
    # Images of the sample grid, always from the same noise.
    config.eval.grid = 16
    # Also log the gradient of each term alone (norm/params/TERM), on one microbatch. It is a second
    # program to compile, about as large as the training step.
    config.eval.term_norms = True

    config.test = ConfigDict()
    # Prompts of the table at the end of the run: base with guidance, base in few steps, R0. ""
    # makes no table.
    config.test.prompts = ""
    config.test.num_prompts = 300
    # Diversity is measured on diversity_prompts of them, with samples_per_prompt images each.
    config.test.diversity_prompts = 40
    config.test.samples_per_prompt = 8
    # Also measure the base, with guidance and in few steps.
    config.test.base = True
    # Steps and guidance of the guided base.
    config.test.base_steps = 25
    config.test.guidance_scale = 7.5
    # Name of a held-out reward of type clip_score. Frechet distance and diversity are measured in
    # its image features; "" measures neither.
    config.test.features = ""
    # "shapes": the prompts are scenes of the embedded world. Its exact judge looks at every image,
    # and the Frechet distance is to rendered scenes. "" has neither.
    config.test.world = ""

    return config.lock()


def trained_rewards(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the entries of `config.rewards` that are computed, those with a weight."""
    return {name: entry for name, entry in config.rewards.items() if entry.weight}


def guided_parts(config: ConfigDict) -> list[str]:
    """Return the parts of a config that call a network without a prompt too, by dotted names."""
    terms = config.regularizers
    guided = {
        "output": terms.output.guided,
        "guidance": True,
        "consistency": True,
        "score": terms.score.scale != 1,
    }
    found = [
        f"regularizers.{name}"
        for name, needs_empty in guided.items()
        if needs_empty and terms[name].weight
    ]
    return found + ["sampler.guidance_scale"] * (config.sampler.guidance_scale > 1)


def is_path(field: str) -> bool:
    """Return whether a field, by its dotted name, holds a path."""
    parts = field.split(".")
    is_entry = parts[0] in ("rewards", "heldout_rewards")
    return field in PATHS or (is_entry and parts[-1] in ("path", "head"))


def make_paths_absolute(config: ConfigDict, section: str = "") -> None:
    """Make every path in a config absolute, so that it means the same file from any folder.

    Relative ones begin in the current folder, and `~` is expanded. "" and URLs stay. `section` is
    the dotted name of what `config` is a part of, with a dot at its end.
    """
    for name, value in list(config.items()):
        if isinstance(value, ConfigDict):
            make_paths_absolute(value, f"{section}{name}.")
        elif isinstance(value, str) and is_path(section + name):
            config[name] = paths.absolute(value)


def reward_entry(
    type: str,
    weight: float = 1.0,
    path: str = "",
    head: str = "",
    logit_scale: bool = False,
    function: str = "",
    cap: float = 1e9,
    resize: str = "bicubic",
    size: int = 448,
    tokens: int = 128,
    language: str = "english",
    questions: tuple[str, ...] = (),
    reads: str = "prompt",
) -> ConfigDict:
    """Return the entry of one reward.

    Args:
      type: "clip_score", "hps_v2", "hps_v2_1", "hps_v3", "pickscore", "image_reward",
        "cycle_reward", "chinese_clip", "vlm_yes_no", "aesthetic" or "function".
      weight: the weight of its normalized gradient.
      path: folder of the weights, as published or as `r0_jax.convert_reward` makes it.
      head: safetensors file of the MLP of "aesthetic"; "" looks for it in the folder.
      logit_scale: a clip_score is exp(logit_scale) times the cosine.
      function: "module:function" of the user's own reward.
      cap: the score from which on this reward does not push an image: relu(cap - score).
      resize: how images come down to the size of the reward's tower: "bicubic", with antialiasing,
        as published; "reduce": means of whole blocks of pixels first. docs/reports/rewards.md
        compares them.
      size: hps_v3 and vlm_yes_no see size^2 pixels of an image: 448 as published, or 224 at about
        a quarter of the image's cost. A multiple of 28.
      tokens: of a prompt, at most so many are read by hps_v3 and vlm_yes_no. Each costs as much as
        28 x 28 pixels, for short prompts too.
      language: of the questions and answers of vlm_yes_no: "english" or "chinese".
      questions: of vlm_yes_no, each with {} for the prompt; their scores are averaged. () asks
        whether the image shows the prompt.
      reads: the field of the prompt file that the reward reads: "prompt", or another text, such as
        the words that the image should show.
    """
    return ConfigDict(
        {
            "type": type,
            "weight": weight,
            "path": path,
            "head": head,
            "logit_scale": logit_scale,
            "function": function,
            "cap": cap,
            "resize": resize,
            "size": size,
            "tokens": tokens,
            "language": language,
            "questions": questions,
            "reads": reads,
        }
    )
