"""The kind Diffusion: pipelines of diffusers, tiny ones made from a seed, and what a folder may lack."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from temper.core.errors import ConfigError, DataError, ModelError, NeedsError
from temper.systems.diffusion import Condition, Diffusion, load_diffusion
from temper.systems.noise import add_noise, alpha_bar, item_generators, level, v_from
from temper.systems.pipelines import check_parts, save_pipeline
from temper.systems.wanted import Wanted

TINY = ("tiny:unet", "tiny:textunet")


def some(system: Diffusion, num: int = 3) -> Condition:
    texts = ["a red circle", "a blue star", "nothing"]
    return system.conditions(texts[:num] if system.takes_text else list(range(num)))


@pytest.fixture(scope="module", params=TINY)
def system(request: pytest.FixtureRequest) -> Diffusion:
    return load_diffusion(request.param, Wanted())


def test_it_can_draw_and_has_gradients(system: Diffusion) -> None:
    assert system.capabilities == {"draw", "grads"}


def test_a_seed_makes_the_model_and_another_makes_another() -> None:
    assert (
        load_diffusion("tiny:unet:3", Wanted()).fingerprint
        == load_diffusion("tiny:unet:3", Wanted()).fingerprint
    )
    assert (
        load_diffusion("tiny:unet:3", Wanted()).fingerprint
        != load_diffusion("tiny:unet:4", Wanted()).fingerprint
    )


def test_pictures_are_pixels_of_the_models_shape(system: Diffusion) -> None:
    pictures = system.draw(some(system), num_steps=3)
    assert [picture.array().shape for picture in pictures] == [(8, 8, 3)] * 3


def test_a_picture_depends_on_its_place_and_the_seed_and_not_on_the_batch(
    system: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = system.draw_pixels(some(system), num_steps=4, seed=5, guidance=2.0)
    monkeypatch.setattr("temper.systems.diffusion.DRAWN_AT_ONCE", 1)
    assert torch.allclose(system.draw_pixels(some(system), 4, 5, 2.0), together, atol=1e-5)
    assert not torch.allclose(system.draw_pixels(some(system), 4, 6, 2.0), together, atol=1e-2)


def test_ancestral_noise_is_an_items_own_too(system: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    noisy = system.with_(scheduler=DDPMScheduler.from_config(system.scheduler.config))
    together = noisy.draw_pixels(some(system), num_steps=4, seed=5)
    monkeypatch.setattr("temper.systems.diffusion.DRAWN_AT_ONCE", 2)
    assert torch.allclose(noisy.draw_pixels(some(system), 4, 5), together, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "sampler", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_the_schedulers_of_diffusers_draw(system: Diffusion, sampler: str) -> None:
    import diffusers

    other = system.with_(scheduler=getattr(diffusers, sampler).from_config(system.scheduler.config))
    assert torch.isfinite(other.draw_pixels(some(system), num_steps=4)).all()
    assert other.fingerprint != system.fingerprint


def test_drawing_is_what_the_pipeline_of_diffusers_draws() -> None:
    """The same noise through StableDiffusionPipeline, which has no VAE here and so gives its latents: our pixels."""
    from diffusers import StableDiffusionPipeline

    system = load_diffusion("tiny:textunet", Wanted())
    noise = torch.randn(system.shape, generator=item_generators(7, 1)[0])[None]
    pipeline = StableDiffusionPipeline(
        None, system.text_encoder, system.tokenizer, system.model, system.scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=some(system, 1).values,
        negative_prompt_embeds=system.nothing(1).values,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
    ours = system.draw_pixels(some(system, 1), num_steps=5, seed=7, guidance=3.0)
    assert torch.allclose(system.to_pixels(theirs), ours, atol=1e-5)


def test_a_folder_keeps_everything(system: Diffusion, tmp_path: Path) -> None:
    save_pipeline(system, tmp_path)
    again = load_diffusion(str(tmp_path), Wanted())
    assert again.labels == system.labels
    assert again.fingerprint == system.fingerprint
    assert torch.equal(again.draw_pixels(some(again), 3, 1, 2.0), system.draw_pixels(some(system), 3, 1, 2.0))


def test_what_stands_beside_the_unet_counts_in_the_fingerprint(system: Diffusion) -> None:
    from diffusers import DDIMScheduler

    other = DDIMScheduler.from_config(system.scheduler.config, beta_end=0.03)
    assert system.with_(scheduler=other).fingerprint != system.fingerprint
    if system.takes_text:
        changed = load_diffusion("tiny:textunet:1", Wanted()).text_encoder
        assert system.with_(text_encoder=changed).fingerprint != system.fingerprint
    else:
        assert system.with_(labels=("a", "b", "c", "d")).fingerprint != system.fingerprint


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_eps_means_noise_whatever_the_model_predicts(system: Diffusion, prediction: str) -> None:
    """A model that answers its own prediction type exactly gives back the noise that was added."""
    from diffusers import DDIMScheduler

    x0, noise, t = torch.randn(2, *system.shape), torch.randn(2, *system.shape), torch.tensor([20, 70])
    scheduler = DDIMScheduler.from_config(system.scheduler.config, prediction_type=prediction)
    ab = level(alpha_bar(scheduler), t, x0)
    answer = {"epsilon": noise, "sample": x0, "v_prediction": v_from(x0, noise, ab)}[prediction]

    class Perfect(torch.nn.Module):
        config = system.model.config

        def forward(self, *args: object, **kwargs: object) -> object:
            return type("Out", (), {"sample": answer})

    perfect = system.with_(model=Perfect(), scheduler=scheduler)
    x_t = add_noise(x0, noise, ab)
    assert torch.allclose(scheduler.add_noise(x0, noise, t), x_t, atol=1e-6)
    assert torch.allclose(perfect.eps(x_t, t, some(system, 2)), noise, atol=1e-4)


def test_guidance_one_is_the_conditional_model_and_zero_the_unconditional(system: Diffusion) -> None:
    x_t, t = torch.randn(2, *system.shape), torch.tensor(9)
    condition, nothing = some(system, 2), system.nothing(2)
    with torch.no_grad():
        plain, empty = system.eps(x_t, t, condition), system.eps(x_t, t, nothing)
        assert torch.allclose(system.eps(x_t, t, condition, 0.0), empty, atol=1e-6)
        assert torch.allclose(system.eps(x_t, t, condition, 3.0), empty + 3 * (plain - empty), atol=1e-5)


def test_classes_go_by_name_or_number_and_others_are_refused() -> None:
    system = load_diffusion("tiny:unet", Wanted())
    assert system.conditions(["star", 3]).values.tolist() == [3, 3]
    for wrong in ("stat", 4, -1):
        with pytest.raises(ConfigError, match="no class"):
            system.conditions([wrong])
    with pytest.raises(DataError, match="no texts"):
        load_diffusion("tiny:textunet", Wanted()).conditions([0])


def test_guidance_needs_a_row_for_nothing() -> None:
    system = load_diffusion("tiny:unet", Wanted()).with_(labels=("a", "b", "c", "d", "e"))
    with pytest.raises(ConfigError, match="unconditional prediction"):
        system.draw_pixels(system.conditions([0]), 2, 0, 2.0)


def test_too_many_steps_are_refused(system: Diffusion) -> None:
    with pytest.raises(ConfigError, match="101 sampling steps"):
        system.draw(some(system), num_steps=101)


def test_pixels_and_the_models_space_are_inverse(system: Diffusion) -> None:
    pixels = torch.rand(2, *system.shape)
    assert torch.allclose(system.to_pixels(system.from_pixels(pixels)), pixels, atol=1e-6)


def test_a_hub_name_is_downloaded_without_what_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    save_pipeline(load_diffusion("tiny:unet", Wanted()), tmp_path)
    asked: dict[str, object] = {}
    monkeypatch.setattr(
        DiffusionPipeline,
        "download",
        lambda name, **settings: asked.update(settings, name=name) or str(tmp_path),
    )
    assert load_diffusion("owner/name", Wanted(revision="abc")).labels[3] == "star"
    assert (asked["name"], asked["revision"], asked["use_safetensors"]) == ("owner/name", "abc", True)
    assert asked["safety_checker"] is None
    assert asked["trust_remote_code"] is False


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    def offline(*args: object, **settings: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(NeedsError, match="cannot be reached"):
        load_diffusion("owner/name", Wanted())


def broken(folder: Path, part: str, value: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = value
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_without_a_scheduler_or_unet_says_so(tmp_path: Path) -> None:
    for part in ("scheduler", "unet"):
        save_pipeline(load_diffusion("tiny:unet", Wanted()), tmp_path / part)
        broken(tmp_path / part, part, [None, None])
        with pytest.raises(ModelError, match=f"no {part}"):
            load_diffusion(str(tmp_path / part), Wanted())
    with pytest.raises(ModelError, match="model_index"):
        load_diffusion(str(tmp_path), Wanted())


def test_a_scheduler_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    save_pipeline(load_diffusion("tiny:unet", Wanted()), tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(ModelError, match="scheduler"):
        load_diffusion(str(tmp_path), Wanted())


def test_weights_that_are_no_numbers_can_do_nothing(system: Diffusion) -> None:
    broken_model = copy.deepcopy(system.model)
    torch.nn.init.constant_(broken_model.conv_out.bias, torch.nan)
    assert system.with_(model=broken_model).capabilities == frozenset()


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    save_pipeline(load_diffusion("tiny:unet", Wanted()), tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(ModelError, match="no safetensors"):
        load_diffusion(str(tmp_path), Wanted())


def test_two_text_encoders_are_refused(tmp_path: Path) -> None:
    save_pipeline(load_diffusion("tiny:textunet", Wanted()), tmp_path)
    broken(tmp_path, "text_encoder_2", ["transformers", "CLIPTextModel"])
    with pytest.raises(ModelError, match="several text encoders"):
        load_diffusion(str(tmp_path), Wanted())


def test_unconditional_models_and_odd_channels_are_refused() -> None:
    from diffusers import UNet2DModel

    system = load_diffusion("tiny:unet", Wanted())
    settings = {key: value for key, value in system.model.config.items() if not key.startswith("_")}
    for change, message in (
        ({"num_class_embeds": None}, "unconditional"),
        ({"in_channels": 4, "out_channels": 4}, "1 or 3 channels"),
        ({"out_channels": 6}, "takes 3 channels and gives 6"),
    ):
        with pytest.raises(ModelError, match=message):
            check_parts(system.with_(model=UNet2DModel(**{**settings, **change})))


def test_a_text_encoder_of_another_width_is_refused() -> None:
    system = load_diffusion("tiny:textunet", Wanted())
    system.model.register_to_config(cross_attention_dim=24)
    with pytest.raises(ModelError, match="width 24"):
        check_parts(system)


def test_flow_matching_has_no_noise_levels() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ModelError, match="no table of noise levels"):
        check_parts(load_diffusion("tiny:unet", Wanted()).with_(scheduler=FlowMatchEulerDiscreteScheduler()))


def test_a_world_that_is_not_made_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    with pytest.raises(NeedsError, match="temper fetch world:classes"):
        load_diffusion("world:classes", Wanted())


def test_a_vae_stands_between_pixels_and_latents() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    system = load_diffusion("tiny:unet", Wanted()).with_(vae=vae)
    check_parts(system)
    assert system.draw_pixels(system.conditions([0]), num_steps=2).shape == (1, 3, 16, 16)
    assert system.from_pixels(torch.rand(1, 3, 16, 16)).shape == (1, 3, 8, 8)
