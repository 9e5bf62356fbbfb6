"""The same step in PyTorch: python -m benchmarks.step.twin FOLDER VARIANT.

Networks, attention and rewards are those of diffusers and transformers, as they come. What the
package puts around them is written here once more, as one would write it in PyTorch: the rollout,
the gradient of the rewards, guidance, output, AdamW and the average. It imports no JAX. It reads
FOLDER/config.json and FOLDER/inputs.npz, and writes its gradient of the first step.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.step import turns
from benchmarks.step.torch_rewards import ClipScore
from benchmarks.step.turns import First
from benchmarks.step.variants import VARIANTS, Variant
from r0_jax.files import read_json


class Draws(NamedTuple):
    """What is random in a step: see `draws.of_step`. Images are [B, c, h, w]."""

    noise: Tensor
    fresh: Tensor  # [K, B, c, h, w]
    eta: Tensor  # [K, B]
    level: Tensor  # [B]
    level_noise: Tensor

    @classmethod
    def like(cls, other: "Draws", random_eta: bool) -> "Draws":
        """Draw other numbers of the same shapes."""
        return cls(
            torch.randn_like(other.noise),
            torch.randn_like(other.fresh),
            torch.rand_like(other.eta) if random_eta else other.eta,
            torch.rand_like(other.level),
            torch.randn_like(other.level_noise),
        )


class Call(NamedTuple):
    """The rewarded call of the generator: its input, its level, and the x0 that it predicts."""

    latents: Tensor
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    x0: Tensor


class Twin:
    """The train step of a UNet, all of whose weights are trained.

    It knows rewards of type clip_score with normalization "per_sample", and the regularizers
    `output` and `guidance` ("pull").
    """

    def __init__(self, config: ConfigDict, folder: Path, inputs: str, variant: Variant):
        """Load the networks of `config`, and the file `inputs` of the folder."""
        self.config, self.folder = config, folder
        given = {k: torch.from_numpy(v) for k, v in np.load(folder / inputs).items()}
        self.prompted, self.empty = given["prompt_embeds"], given["empty/prompt_embeds"]
        self.last, self.rate = given["last"].tolist(), given["rate"].tolist()
        self.draws = Draws(*(channels_first(given[name]) for name in Draws._fields))
        self.unet = UNet2DConditionModel.from_pretrained(config.pretrained, subfolder="unet")
        self.base = copy.deepcopy(self.unet).requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(config.pretrained, subfolder="vae")
        self.vae = vae.requires_grad_(False)
        self.rewards = {
            name: ClipScore(entry.path, given[f"features/{name}"])
            for name, entry in config.rewards.items()
        }
        self._set_schedule()
        self._set_variant(variant)
        self._set_optimizer()

    def _set_schedule(self) -> None:
        """Read the levels of training, by timestep, and those of the few steps."""
        scheduler = DDIMScheduler.from_pretrained(
            self.config.pretrained, subfolder="scheduler", timestep_spacing="trailing"
        )
        scheduler.set_timesteps(self.config.sampler.num_steps)
        self.prediction_type = scheduler.config.prediction_type
        self.grid = scheduler.timesteps.tolist()
        self.alphas = scheduler.alphas_cumprod.sqrt()
        self.sigmas = (1 - scheduler.alphas_cumprod).sqrt()

    def _set_variant(self, variant: Variant) -> None:
        modules = [
            self.unet,
            self.base,
            self.vae.decoder,
            *(r.tower for r in self.rewards.values()),
        ]
        for module in modules:
            if variant.channels_last:
                module.to(memory_format=torch.channels_last)
            if variant.backend:
                module.compile(backend=variant.backend)

    def _set_optimizer(self) -> None:
        c, params = self.config.optimizer, list(self.unet.parameters())
        decayed = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": c.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            decayed, c.learning_rate, (c.b1, c.b2), c.eps, fused=True
        )
        self.params, self.average = params, [p.detach().clone() for p in params]

    # --- the sides of the comparison --------------------------------------------------------------

    def first(self) -> First:
        """Take the first step and write its gradient."""
        begin = time.perf_counter()
        metrics = self.backward(0, self.draws)
        gradient = {name: p.grad.clone().contiguous() for name, p in self.unet.named_parameters()}
        metrics["norm/grads"] = self.update(0)
        seconds = time.perf_counter() - begin
        path = "twin.safetensors"
        save_file(gradient, self.folder / path)
        return First({name: float(x) for name, x in metrics.items()}, path, seconds)

    def run(self, begin: int, steps: int) -> float:
        """Take steps from number `begin` on; return their seconds."""
        start = time.perf_counter()
        for number in range(begin, begin + steps):
            self.backward(number, Draws.like(self.draws, self.config.sampler.random_eta))
            self.update(number)
        return time.perf_counter() - start

    # --- a step -----------------------------------------------------------------------------------

    def backward(self, number: int, draws: Draws) -> dict[str, Tensor]:
        """Add the gradient of a step's loss to the parameters; return metrics."""
        last = self.last[number]
        call = self.rollout(draws, last)
        still = Call(*(x.detach() for x in call))
        pulls, metrics = self.pulls(still, draws, last)
        pull = sum(pulls.values())
        if self.config.objective.method == "r0plus":
            pull = pull / self.gain(last)
        loss = -(pull * call.x0).sum(dim=(1, 2, 3)).mean()
        loss.backward()
        metrics |= {f"norm/x0/{name}": norm(x).mean() for name, x in pulls.items()}
        return metrics | {"train/loss": loss.detach()}

    def update(self, number: int) -> Tensor:
        """Change parameters and average; return the norm of the gradient."""
        c = self.config
        total = torch.nn.utils.clip_grad_norm_(self.params, c.optimizer.clip_norm)
        if torch.isfinite(total):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate[number]
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.params, 1 - c.ema_decay)
        self.optimizer.zero_grad()
        return total

    def rollout(self, draws: Draws, last: int) -> Call:
        """Draw up to call `last`; the last `grad_steps` calls have a gradient."""
        is_plus = self.config.objective.method == "r0plus"
        first = last + 1 - (1 if is_plus else self.config.objective.grad_steps)
        latents = draws.noise
        for i in range(last + 1):
            with torch.set_grad_enabled(i >= first):
                alpha, sigma = self.level(i)
                timesteps = torch.full((len(latents),), self.grid[i])
                output = self.generate(latents, timesteps)
                x0, epsilon = self.clean(output, latents, alpha, sigma)
                if i < last:
                    eta = draws.eta[i][:, None, None, None]
                    alpha, sigma = self.level(i + 1)
                    noise = (1 - eta**2).sqrt() * epsilon + eta * draws.fresh[i]
                    latents = alpha * x0 + sigma * noise
                    if i >= first and self.config.objective.bound:
                        latents.register_hook(self.bounded)
        return Call(latents, timesteps, alpha, sigma, x0)

    def bounded(self, gradient: Tensor) -> Tensor:
        """Scale a sample's gradient down to config.objective.bound, as a share of the mean loss."""
        norms = gradient.flatten(1).norm(dim=1)[:, None, None, None]
        bound = self.config.objective.bound / len(gradient)
        return gradient * (bound / norms.clamp_min(1e-30)).clamp_max(1.0)

    def generate(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Call the generator once; with remat = "calls" its activations are computed again."""
        if self.config.remat == "calls" and torch.is_grad_enabled():
            arguments = (self.unet, latents, timesteps, self.prompted)
            return checkpoint(denoise, *arguments, use_reentrant=False)
        return denoise(self.unet, latents, timesteps, self.prompted)

    def pulls(
        self, call: Call, draws: Draws, last: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what pulls at x0, by term and with its weight, and metrics."""
        terms = self.config.regularizers
        pulls, metrics = {}, {}
        pulls["rewards"], metrics = self.rewards_pull(call.x0)
        with torch.no_grad():
            if terms.output.weight:
                pulls["output"] = terms.output.weight * self.output(call)
            if terms.guidance.weight:
                pulls["guidance"] = terms.guidance.weight * self.guidance(call.x0, draws, last)
        return pulls, metrics

    def rewards_pull(self, x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of the rewards at x0, of norm 1, and metrics."""
        x0 = x0.clone().requires_grad_()
        images = self.vae.decode(x0 / self.vae.config.scaling_factor).sample / 2 + 0.5
        clipped, total, metrics = images.detach().clamp(0, 1), torch.zeros_like(images), {}
        for name, reward in self.rewards.items():
            seen = clipped.clone().requires_grad_()
            scores = reward(seen)
            (gradient,) = torch.autograd.grad(scores.sum(), seen)
            size = norm(gradient)
            share = self.config.rewards[name].weight / (size + self.config.objective.delta)
            total += share[:, None, None, None] * gradient
            metrics[f"reward/{name}"] = scores.detach().mean()
            metrics[f"norm/reward_grads/{name}"] = size.mean()
        leaves = ((images > 1) & (total > 0)) | ((images < 0) & (total < 0))
        (pull,) = torch.autograd.grad(images, x0, total.masked_fill(leaves, 0))
        return pull / (norm(pull) + 1e-20)[:, None, None, None], metrics

    def output(self, call: Call) -> Tensor:
        """Return the pull to what the base predicts at the same noisy input."""
        output = denoise(self.base, call.latents, call.timesteps, self.prompted)
        target, _ = self.clean(output, call.latents, call.alpha, call.sigma)
        return (target - call.x0) / math.sqrt(call.x0[0].numel())

    def guidance(self, x0: Tensor, draws: Draws, last: int) -> Tensor:
        """Return the pull to what the guided base predicts of x0 with noise on it."""
        terms, count = self.config.regularizers.guidance, len(self.alphas)
        floor = self.floor(last) if self.config.objective.method == "r0plus" else 0.0
        least, most = max(terms.least, floor), max(terms.most, floor)
        share = least + (most - least) * draws.level
        timesteps = count - 1 - ((1 - share) * count).clamp(0, count - 1).long()
        alpha, sigma = (x[timesteps][:, None, None, None] for x in (self.alphas, self.sigmas))
        noised = alpha * x0 + sigma * draws.level_noise
        both = torch.cat([self.prompted, self.empty.expand_as(self.prompted)])
        output = denoise(self.base, noised.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        prompted, empty = (self.clean(x, noised, alpha, sigma)[0] for x in output.chunk(2))
        guided = empty + terms.scale * (prompted - empty)
        return (guided - x0) / math.sqrt(x0[0].numel())

    # --- the noise schedule -----------------------------------------------------------------------

    def level(self, i: int) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of call i of the grid."""
        return self.alphas[self.grid[i]], self.sigmas[self.grid[i]]

    def clean(
        self, output: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x0 and the noise that an output of the network stands for."""
        if self.prediction_type == "v_prediction":
            return alpha * latents - sigma * output, alpha * output + sigma * latents
        return (latents - sigma * output) / alpha, output

    def gain(self, i: int) -> Tensor:
        """Return |d x0 / d output| of call i."""
        alpha, sigma = self.level(i)
        return sigma if self.prediction_type == "v_prediction" else sigma / alpha

    def floor(self, i: int) -> float:
        """Return where call i ends, as a share of the trained timesteps."""
        after = self.grid[i + 1] + 1 if i + 1 < len(self.grid) else 0
        return after / len(self.alphas)


def denoise(
    unet: Callable[..., Any], latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor
) -> Tensor:
    """Return the output of the network, [B, c, h, w]."""
    return unet(latents, timesteps, prompt_embeds, return_dict=False)[0]


def channels_first(x: Tensor) -> Tensor:
    """Return images [..., h, w, c] as [..., c, h, w], and anything else as it is."""
    return x.movedim(-1, -3).contiguous() if x.ndim > 3 else x


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample."""
    return x.flatten(1).norm(dim=1)


def main() -> None:
    transformers.logging.set_verbosity_error()  # it lists text towers, which are not needed
    transformers.logging.disable_progress_bar()
    folder, name, answers = Path(sys.argv[1]), sys.argv[2], turns.take_stdout()
    config = ConfigDict(read_json(folder / "config.json"))
    turns.serve(Twin(config, folder, "inputs.npz", VARIANTS[name]), answers)


if __name__ == "__main__":
    main()
