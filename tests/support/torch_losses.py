"""The published distillation losses in PyTorch, with the conventions of their own code.

Timesteps count up; a network is (latents, timesteps [B], prompted) -> output; losses are [B].
"""

import numpy as np
import torch

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_CUMPROD = torch.tensor(np.cumprod(1 - BETAS))  # of Stable Diffusion 1.5
SHIFT = 3.0  # of Stable Diffusion 3


def levels(kind, t):
    """alpha and sigma [B, 1, 1, 1] of timesteps [B], which flow matching shifts afterwards."""
    if kind == "flow":
        s = (t + 1) / 1000
        sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
        return (1 - sigma)[:, None, None, None], sigma[:, None, None, None]
    product = ALPHAS_CUMPROD[t.long()][:, None, None, None]
    return product.sqrt(), (1 - product).sqrt()


def called(kind, network, z, t, prompted=True):
    """The network's output on z at timesteps t, as it counts them."""
    told = levels(kind, t)[1].flatten() * 1000 if kind == "flow" else t
    return network(z, told, prompted)


def clean(kind, output, z, alpha, sigma):
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * z - sigma * output
    return z - sigma * output


def noise(kind, output, z, alpha, sigma):
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return alpha * output + sigma * z
    return z + alpha * output


def rg_lcm(kind, x0, z, t, w, teacher, target, skip=20, c=1e-3, form="huber"):
    """Latent consistency distillation of RG-LCM's SDXL-LoRA variant, at the student's x0 of z."""
    s = (t - skip).clamp(min=0)
    w = w[:, None, None, None]
    with torch.no_grad():
        now, later = levels(kind, t), levels(kind, s)
        outputs = [called(kind, teacher, z, t, prompted) for prompted in (True, False)]
        if kind == "flow":
            prompted, empty = outputs
            z_s = z + (later[1] - now[1]) * (prompted + w * (prompted - empty))
        else:
            x0_c, x0_u = (clean(kind, output, z, *now) for output in outputs)
            eps_c, eps_u = (noise(kind, output, z, *now) for output in outputs)
            z_s = later[0] * (x0_c + w * (x0_c - x0_u)) + later[1] * (eps_c + w * (eps_c - eps_u))
        scaled = 10.0 * s[:, None, None, None]
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        predicted = clean(kind, called(kind, target, z_s, s), z_s, *later)
        wanted = c_skip * z_s + c_out * predicted
    if form == "l2":
        return ((x0 - wanted) ** 2).mean((1, 2, 3))
    return (((x0 - wanted) ** 2 + c**2).sqrt() - c).mean((1, 2, 3))


def scores(kind, x, t, n, base, fake, g):
    alpha, sigma = levels(kind, t)
    x_t = alpha * x + sigma * n
    x_c, x_u = (
        clean(kind, called(kind, base, x_t, t, prompted), x_t, alpha, sigma)
        for prompted in (True, False)
    )
    return x_u + g * (x_c - x_u), clean(kind, called(kind, fake, x_t, t), x_t, alpha, sigma)


def dmd(kind, x, t, n, base, fake, g):
    """Diff-Instruct's integral KL with the weight of DMD2, at levels t with noise n."""
    with torch.no_grad():
        x_real, x_fake = scores(kind, x, t, n, base, fake, g)
        gradient = (x_fake - x_real) / (x - x_real).abs().mean((1, 2, 3), keepdim=True)
    return 0.5 * ((x - (x - gradient).detach()) ** 2).mean((1, 2, 3))


def sid(kind, x, t, n, base, fake, g):
    """The score identity loss with alpha = 1 (SiD, Diff-Instruct*)."""
    x_real, x_fake = scores(kind, x, t, n, base, fake, g)
    size = (x - x_real).detach().abs().mean((1, 2, 3), keepdim=True)
    return ((x_real - x_fake) * (x_fake - x) / size).mean((1, 2, 3))


def denoising(kind, x, t, n, fake):
    """What the fake score is trained by: DMD2's loss of epsilon, of v where v is predicted."""
    alpha, sigma = levels(kind, t)
    output = called(kind, fake, alpha * x + sigma * n, t)
    wanted = {"epsilon": n, "v_prediction": alpha * n - sigma * x, "flow": n - x}[kind]
    return ((output - wanted) ** 2).mean((1, 2, 3))
