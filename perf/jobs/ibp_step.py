"""A certified training step (interval bounds, robust loss, backward, optimiser) beside a plain step of the same CNN."""

from __future__ import annotations

from typing import Any

from harness import Job, Measured, Side, main, timed

STEPS, WARM_UP, COMPARED = 60, 3, 32


def inputs() -> dict[str, Any]:
    """Sizes only; every side draws the same images, labels and weights from the seed, with the same torch."""
    return {"seed": 0, "batch": 128, "side": 28, "eps": 0.1}


def build(given: dict[str, Any], norms: bool, channels_last: bool) -> tuple[Any, Any, Any]:
    """Three convolutions and two linear layers, a batch of images in [0, 1] and their labels."""
    import torch
    from torch import nn

    torch.manual_seed(given["seed"])

    def norm(kind: Any, width: int) -> list[Any]:
        return [kind(width)] if norms else []

    quarter = given["side"] // 4
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), *norm(nn.BatchNorm2d, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), *norm(nn.BatchNorm2d, 32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), *norm(nn.BatchNorm2d, 32), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * quarter**2, 100), *norm(nn.BatchNorm1d, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    images = torch.rand(given["batch"], 1, given["side"], given["side"])
    labels = torch.randint(10, (given["batch"],))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    return network, images, labels


def steps(parameters: Any, loss_of: Any, outputs: dict[str, Any]) -> Measured:
    """Seconds of STEPS training steps after a warm-up, whose losses are kept: they show that gradients agree too."""
    import torch

    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, lr=5e-4)

    def step() -> Any:
        optimiser.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10)
        optimiser.step()
        return loss.detach()

    losses = [float(step()) for _ in range(WARM_UP)]
    _, seconds = timed(lambda: [step() for _ in range(STEPS)])
    return Measured(STEPS, seconds, {**outputs, "losses": losses})


def plain(norms: bool = False, channels_last: bool = False) -> Any:
    """A step of ordinary training."""

    def run(given: dict[str, Any]) -> Measured:
        from torch.nn.functional import cross_entropy

        network, images, labels = build(given, norms, channels_last)
        return steps(network.parameters(), lambda: cross_entropy(network(images), labels), {})

    return run


def temper(norms: bool = False, channels_last: bool = False) -> Any:
    """A step on the bounds of `temper.ops`."""

    def run(given: dict[str, Any]) -> Measured:
        from temper.ops.bounds import input_box, robust_losses
        from temper.ops.network_bounds import BoundedNetwork

        network, images, labels = build(given, norms, channels_last)
        bounded = BoundedNetwork(network)

        def margins() -> Any:
            return bounded.bounds(input_box(images, given["eps"]), labels).margins

        shown = margins()[:COMPARED].tolist()
        return steps(network.parameters(), lambda: robust_losses(margins()).mean(), {"margins": shown})

    return run


def auto_lirpa(norms: bool = False) -> Any:
    """A step on auto_LiRPA's interval bounds, called as its users do: with batch norm after a clean forward pass."""

    def run(given: dict[str, Any]) -> Measured:
        import torch
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

        network, images, labels = build(given, norms, channels_last=False)
        bounded = BoundedModule(network, torch.zeros_like(images[:2]))
        bounded.train()
        ends = {"x_L": (images - given["eps"]).clamp(min=0), "x_U": (images + given["eps"]).clamp(max=1)}
        ball = PerturbationLpNorm(norm=float("inf"), eps=given["eps"], **ends)
        one_hot = torch.eye(10)[labels].bool()
        rows = torch.eye(10)[labels][:, None] - torch.eye(10)
        rows = rows[~one_hot].view(len(labels), 9, 10)
        first = torch.zeros(len(labels), dtype=torch.long)

        def margins() -> Any:
            if norms:
                bounded(BoundedTensor(images, ball))
                return bounded.compute_bounds(IBP=True, C=rows, method=None)[0]
            return bounded.compute_bounds((BoundedTensor(images, ball),), IBP=True, C=rows, method=None)[0]

        def loss() -> Any:
            lower = margins()
            return torch.nn.functional.cross_entropy(
                -torch.cat([torch.zeros(len(lower), 1), lower], 1), first
            )

        bounded(BoundedTensor(images, ball))
        shown = torch.zeros(len(labels), 10).masked_scatter(~one_hot, margins().detach())[:COMPARED].tolist()
        return steps(bounded.parameters(), loss, {"margins": shown})

    return run


def check(outputs: dict[str, Any]) -> str:
    """Margins of the first items and losses of the first steps agree, with batch norm and without."""
    worst_margin, worst_loss, pairs = 0.0, 0.0, 0
    for norms in (False, True):
        found = [out for name, out in outputs.items() if "margins" in out and ("batch norm" in name) == norms]
        for other in found[1:]:
            ours, theirs = ([value for row in one["margins"] for value in row] for one in (found[0], other))
            scale = max(map(abs, ours))
            worst_margin = max(worst_margin, *(abs(a - b) / scale for a, b in zip(ours, theirs, strict=True)))
            losses = zip(found[0]["losses"], other["losses"], strict=True)
            worst_loss = max(worst_loss, *(abs(a - b) / abs(a) for a, b in losses))
            pairs += 1
    assert worst_margin < 1e-5, worst_margin
    assert worst_loss < 1e-3, worst_loss
    return f"{pairs} pairs: margins equal to {worst_margin:.0e} of the largest, losses of {WARM_UP} steps to {worst_loss:.0e}"


def limit(given: dict[str, Any], limits: dict[str, float]) -> float:
    """Seconds a step of its products alone: centres and radii, forward and backward, none back into the images."""
    side = given["side"]
    shapes = (
        (side**2, 9 * 1, 16), ((side // 2) ** 2, 9 * 16, 32), ((side // 4) ** 2, 9 * 32, 32),
        (1, 32 * (side // 4) ** 2, 100), (1, 100, 10),
    )  # fmt: skip
    forward = [2 * given["batch"] * places * inputs * outputs for places, inputs, outputs in shapes]
    return 2 * (3 * sum(forward) - forward[0]) / limits["flops_fp32"]


JOB = Job(
    name="ibp-step",
    about=__doc__ or "",
    unit="s/step",
    target=2.0,
    lower_is_better=True,
    inputs=inputs,
    sides={
        "temper": Side(temper(channels_last=True)),
        "plain step": Side(plain()),
        "plain step, channels last": Side(plain(channels_last=True)),
        "auto_LiRPA": Side(auto_lirpa(), env="auto_lirpa", counts=False),
        "plain step, batch norm": Side(plain(norms=True), counts=False),
        "temper, batch norm": Side(temper(norms=True), counts=False),
        "auto_LiRPA, batch norm": Side(auto_lirpa(norms=True), env="auto_lirpa", counts=False),
    },
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
