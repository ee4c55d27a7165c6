"""Speed of world_models.py as JSON, beside the usual PyTorch implementations of V and M measured in the same run.

Run:  python benchmark/world_models_speed.py [--threads 1] [--no-cuda] [--env-id CarRacing-v3]
On the CPU the seconds are those that the process spends computing, over its threads: other programs do not count. The
usual V has plain layers, contiguous images and plain Adam; the usual M nn.LSTM and one set of weights for all
dimensions, i.e. a smaller head.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import world_models


def seconds(function: Callable, device: torch.device, repeats: int) -> float:
    """Fastest of some calls, after one for warming up."""
    clock, fastest = time.perf_counter if device.type == "cuda" else time.process_time, float("inf")
    for i in range(repeats + 1):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            fastest = min(fastest, clock() - start)
    return fastest / (1 if device.type == "cuda" else torch.get_num_threads())


class UsualVAE(world_models.VAE):
    """The same parameters, each layer as it stands."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x = self.dense(z)[:, :, None, None]
        for layer in (self.deconv1, self.deconv2, self.deconv3):
            x = F.relu(layer(x))
        return torch.sigmoid(self.deconv4(x))


class UsualMDNRNN(nn.Module):
    """nn.LSTM and a mixture of diagonal Gaussians with one set of weights: (2 Z + 1) K outputs and two heads."""

    def __init__(self, inputs: int, units: int, latent_size: int, num_mixtures: int):
        super().__init__()
        self.sizes = (num_mixtures * latent_size, num_mixtures * latent_size, num_mixtures, 2)
        self.shape = (num_mixtures, latent_size)
        self.lstm, self.head = nn.LSTM(inputs, units), nn.Linear(units, sum(self.sizes))

    def loss(self, inputs: torch.Tensor, next_z: torch.Tensor) -> torch.Tensor:
        mu, log_sigma, log_pi, _ = self.head(self.lstm(inputs)[0]).split(self.sizes, -1)
        density = torch.distributions.Normal(mu.unflatten(-1, self.shape), log_sigma.unflatten(-1, self.shape).exp())
        log_prob = density.log_prob(next_z.unsqueeze(-2)).sum(-1)
        return -torch.logsumexp(torch.log_softmax(log_pi, -1) + log_prob, -1).mean()


def vae_rates(args: world_models.Args, device: torch.device, batch_size: int) -> dict[str, float]:
    """Training frames per second, ours and usual."""
    frames = torch.randint(256, (batch_size, 64, 64, 3), dtype=torch.uint8, device=device)
    noise, rates = torch.randn(batch_size, args.latent_size, device=device), {}
    for name, kind in {"vae": world_models.VAE, "usual_vae": UsualVAE}.items():
        vae, ours = kind(args.latent_size, args.vae_depth).to(device), name == "vae"
        optimizer = torch.optim.Adam(vae.parameters(), args.vae_lr, fused=ours)
        image = world_models.preprocess(frames)
        if ours:
            vae.to(memory_format=torch.channels_last)
        else:
            image = image.contiguous()
        update = world_models.update_vae, vae, optimizer, image, noise, args
        rates[f"{name}_frames_per_s"] = batch_size / seconds(lambda: update[0](*update[1:]), device, 5)  # noqa: B023
    return rates


def model_rates(args: world_models.Args, spec: world_models.Spec, device: torch.device) -> dict[str, float]:
    """Training sequences per second of B x T steps, ours and usual."""
    T, B, Z = args.sequence_length, args.model_batch_size, args.latent_size
    model = world_models.MDNRNN(spec, args).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.model_lr, fused=True)
    batch = {"z": torch.randn(T, B, Z), "next_z": torch.randn(T, B, Z), "action": torch.randn(T, B, spec.action_dim)}
    batch |= {name: torch.zeros(T, B) for name in ("first", "terminated", "reward")}
    batch |= {name: torch.ones(T, B) for name in ("mask", "has_next")}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    update = [model], optimizer, batch, args
    rates = {"model_sequences_per_s": B / seconds(lambda: world_models.update_model(*update), device, 2)}

    usual = UsualMDNRNN(Z + spec.action_dim, args.hidden_size, Z, args.num_mixtures).to(device)
    usual_optimizer = torch.optim.Adam(usual.parameters(), args.model_lr)

    def usual_update() -> None:
        usual_optimizer.zero_grad()
        usual.loss(torch.cat([batch["z"], batch["action"]], -1), batch["next_z"]).backward()
        usual_optimizer.step()

    return rates | {"usual_model_sequences_per_s": B / seconds(usual_update, device, 2)}


def dream_rate(args: world_models.Args, spec: world_models.Spec, device: torch.device) -> float:
    """Dream steps per second of population x episodes dreams of which none ends."""
    agent = world_models.Agent(spec, args).to(device)
    nn.init.constant_(agent.model.head.bias[-2:], -9.0)
    weights = torch.randn(args.population, *agent.controller.shape, device=device)
    policy, jobs = world_models.linear_policy(weights, spec.action_kind), args.population * args.episodes
    dreams = agent, policy, jobs, args.episodes, torch.Generator(device), args
    return jobs * args.dream_length / seconds(lambda: world_models.dream(*dreams), device, 3)


def collection_rate(args: world_models.Args, steps: int = 500) -> float:
    """Steps per wall-clock second of one environment with held random actions."""
    envs = world_models.make_vector_env(args, 1)
    spec = world_models.make_spec(envs, args)
    held = world_models.HeldActions(1, world_models.Agent(spec, args), args, np.random.default_rng(1))
    envs.reset(seed=[1])
    start, dones = time.perf_counter(), np.zeros(1, bool)
    for i in range(steps):
        if dones.any():
            envs.reset(seed=[i])
        actions = world_models.env_action(held(), spec.action_kind)
        _, _, terminations, truncations, _ = envs.step(actions)
        dones = terminations | truncations
    rate = steps / (time.perf_counter() - start)
    envs.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--env-id", default="CarRacing-v3")
    parser.add_argument("--vae-batch-size", type=int, default=128)
    parser.add_argument("--no-cuda", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    args = world_models.Args(
        env_id=flags.env_id, cuda=not flags.no_cuda, dream_length=25, sequence_length=500, controller_env="dream"
    )  # fmt: skip
    args = world_models.with_task_defaults(args)
    device = world_models.choose_device(args)
    envs = world_models.make_vector_env(args, 1)
    spec = world_models.make_spec(envs, args)
    envs.close()
    world_models.keep_freed_memory(device)
    torch.manual_seed(1)
    matrix = torch.randn(2048, 2048, device=device)
    result = {"device": str(device), "threads": flags.threads, "torch": torch.__version__, "env_id": args.env_id}
    result |= {"matmul_gflops": 2 * 2048**3 / 1e9 / seconds(lambda: matrix @ matrix, device, 5)}
    result |= vae_rates(args, device, flags.vae_batch_size) | model_rates(args, spec, device)
    result |= {"dream_steps_per_s": dream_rate(args, spec, device)}
    result |= {"collection_steps_per_s": collection_rate(args)}
    result["load"] = os.getloadavg()[0]  # processes that wanted to compute meanwhile, this one among them
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
