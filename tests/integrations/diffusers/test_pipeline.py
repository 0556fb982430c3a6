"""SiDPipeline: its numbers against diffusers' parts called one by one, its seeds, its arguments, its capture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import accelerate
from sign_fast.integrations.diffusers import pipeline as pipeline_module
from sign_fast.integrations.diffusers.prompts import PromptEncoder
from sign_fast.kernels import dispatch
from sign_fast.kernels.dispatch import SlowPathError, SlowPathWarning
from sign_fast.sampling import few_step_latent
from sign_fast.sampling.graphs import GraphRecaptureWarning
from tests.golden_rules import OUTPUT_TOLERANCE, arrays, filled, normal, relative_error, settings
from tests.integrations.diffusers import tiny
from tests.integrations.diffusers.students import PROMPTS, floats, fresh, latents_of

EACH_KIND = pytest.mark.parametrize("kind", tiny.KINDS)


@pytest.fixture(scope="module")
def made():
    """Pipelines by kind, made once; tests that change one make their own."""
    pipes = {}

    def of(kind):
        if kind not in pipes:
            pipes[kind] = fresh(kind)
        return pipes[kind]

    return of


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- numbers ----


@EACH_KIND
@pytest.mark.parametrize("steps", [1, 3])
def test_images_are_those_of_diffusers_parts_called_one_by_one(made, kind, steps):
    pipe = made(kind)
    got = pipe(PROMPTS, num_inference_steps=steps, generator=torch.Generator().manual_seed(3)).images
    plain = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    teacher = plain.from_pretrained(tiny.folder(kind))
    with torch.no_grad():
        encoded = teacher.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = (
            {"text_embeds": encoded[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
            if kind == "sdxl"
            else None
        )
        factor = 1000 if kind == "flow" else 1

        def predict(x, t):
            return teacher.unet(x, t * factor, encoded[0], added_cond_kwargs=added).sample

        generator = torch.Generator().manual_seed(3)
        draw = lambda x: randn_tensor(x.shape, generator=generator)  # noqa: E731
        prediction = {"sd2-v": "v", "flow": "flow"}.get(kind, "epsilon")
        latents = few_step_latent(predict, draw(torch.empty(2, 4, 8, 8)), draw, steps, prediction)
        decoded = teacher.vae.decode(latents / teacher.vae.config.scaling_factor).sample
    want = VaeImageProcessor().postprocess(decoded, output_type="pil")
    for a, b in zip(got, want, strict=True):
        assert a.size == b.size == (64, 64) and a.mode == "RGB"
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_golden_generation(steps, monkeypatch):
    pipe = fresh("sd15")
    info = settings("latent")
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            p.copy_(filled(info["weights"]["generator"], name, p))
    numbers = iter(range(22, 30))
    monkeypatch.setattr(pipeline_module, "draws_of", lambda *given: lambda x: normal(next(numbers), *x.shape))
    embeddings = normal(info["emb_seed"], 4, 8, 16)[:3]
    got = latents_of(pipe, None, prompt_embeds=embeddings, latents=normal(21, 3, 4, 8, 8), num_inference_steps=steps)
    assert relative_error(got, arrays("latent")[f"gen/K{steps}"]) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize(
    "schedule", [{"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.002] * 1000}]
)
def test_a_schedule_of_its_own(made, schedule):
    pipe = fresh("sd15", scheduler=DDPMScheduler(**{**tiny.SCHEDULE, **schedule}))
    text = PromptEncoder(pipe).encode(PROMPTS)
    bars = tuple(pipe.scheduler.alphas_cumprod.tolist())
    z = normal(1, 2, 4, 8, 8)
    with torch.no_grad():
        want = few_step_latent(
            lambda x, t: pipe.unet(x, t, text.states).sample, z, num_steps=2, noise="fixed", bars=bars
        )
    got = latents_of(pipe, latents=z, num_inference_steps=2, noise_type="fixed")
    assert relative_error(got, want) <= OUTPUT_TOLERANCE
    published = latents_of(made("sd15"), latents=z, num_inference_steps=2, noise_type="fixed")
    assert relative_error(got, published) > 1e-2


def test_output_types_and_sizes(made):
    pipe = made("sd15")
    given = {"num_inference_steps": 1, "height": 40, "width": 72, "seeds": [4, 5]}
    images = pipe(PROMPTS, **given).images
    array = floats(pipe, **given)
    tensor = pipe(PROMPTS, output_type="pt", **given).images
    (latents,) = pipe(PROMPTS, output_type="latent", return_dict=False, **given)
    assert [image.size for image in images] == [(72, 40)] * 2
    assert array.shape == (2, 40, 72, 3) and array.dtype == np.float32 and tensor.shape == (2, 3, 40, 72)
    assert latents.shape == (2, 4, 5, 9) and latents.dtype == torch.float32
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array) and 0 <= array.min() < array.max() <= 1
    assert np.abs(np.asarray(images[1], float) - 255 * array[1]).max() <= 0.51


def test_half_precision(made):
    want = floats(made("sd15"), num_inference_steps=2, seeds=[1, 2])
    pipe = fresh("sd15", torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    got = floats(pipe, num_inference_steps=2, seeds=[1, 2])
    assert got.dtype == np.float32 and np.abs(got - want).max() <= 0.1


def test_a_vae_that_overflows_in_float16_stays_in_float32_and_says_so(made, monkeypatch):
    want = floats(made("sdxl"), num_inference_steps=2, seeds=[1, 2])
    pipe = fresh("sdxl", torch_dtype=torch.float16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16 and pipe.vae.dtype == torch.float32
    monkeypatch.setattr(dispatch, "_warned", set())
    latents_of(pipe, num_inference_steps=1, seeds=[1, 2])
    with pytest.warns(SlowPathWarning, match="so it stays in float32; load in bfloat16, or set force") as record:
        got = floats(pipe, num_inference_steps=2, seeds=[1, 2])
        pipe.to(torch.float16)  # later, all parts
        again = floats(pipe, num_inference_steps=2, seeds=[1, 2])
    assert len(record) == 1 and pipe.vae.dtype == torch.float32
    assert np.abs(got - want).max() <= 0.1 and np.abs(again - want).max() <= 0.1
    monkeypatch.setenv("SIGN_FAST_STRICT", "1")
    with pytest.raises(SlowPathError, match="decoding: SDXL's VAE overflows in float16"):
        floats(pipe, num_inference_steps=1, seeds=[1, 2])
    pipe.vae.register_to_config(force_upcast=False)
    pipe.to(torch.float16)
    assert np.isfinite(floats(pipe, num_inference_steps=1, seeds=[1, 2])).all() and pipe.vae.dtype == torch.float16


def test_a_vae_that_does_not_overflow_decodes_in_float16(made, recwarn):
    want = floats(made("sd15"), num_inference_steps=2, seeds=[1, 2])
    pipe = fresh("sd15", torch_dtype=torch.float16)
    assert pipe.vae.config.force_upcast  # by default
    got = floats(pipe, num_inference_steps=2, seeds=[1, 2])
    assert pipe.vae.dtype == torch.float16 and np.abs(got - want).max() <= 0.1
    assert not [w for w in recwarn if w.category is SlowPathWarning]


# ---- seeds and generators ----


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
def test_an_image_depends_on_its_own_seed_alone(made, noise):
    pipe = made("sd15")
    given = {"num_inference_steps": 3, "noise_type": noise}
    several = floats(pipe, ["a cat", "the dog", "red"], seeds=[7, 8, 9], **given)
    turned = floats(pipe, ["red", "a cat"], seeds=[9, 7], **given)
    (alone,) = floats(pipe, "the dog", seeds=8, **given)
    for a, b in ((several[0], turned[1]), (several[2], turned[0]), (several[1], alone)):
        assert np.abs(a - b).max() <= 1e-4  # other batches round otherwise
    assert np.abs(several[1] - floats(pipe, "the dog", seeds=[7], **given)[0]).max() > 1e-2


def test_an_image_depends_on_its_own_generator_alone(made):
    pipe = made("sd15")
    several = floats(pipe, ["a cat", "the dog"], generator=generators(7, 8), num_inference_steps=3)
    (alone,) = floats(pipe, "the dog", generator=torch.Generator().manual_seed(8), num_inference_steps=3)
    assert np.abs(several[1] - alone).max() <= 1e-4
    (listed,) = floats(pipe, "the dog", generator=generators(8), num_inference_steps=3)
    assert np.array_equal(listed, alone)


def test_one_generator_draws_as_diffusers_does(made):
    pipe = made("sd15")
    drawn = randn_tensor((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    got = latents_of(pipe, generator=torch.Generator().manual_seed(5), num_inference_steps=2, noise_type="ddim")
    assert torch.equal(got, latents_of(pipe, latents=drawn, num_inference_steps=2, noise_type="ddim"))
    torch.manual_seed(5)
    assert torch.equal(got, latents_of(pipe, num_inference_steps=2, noise_type="ddim"))


def test_seeds_name_images_whatever_the_default_dtype(made):
    pipe = made("sd15")
    for draws in (lambda: {"seeds": [1, 2]}, lambda: {"generator": generators(1, 2)}):
        want = latents_of(pipe, num_inference_steps=2, **draws())
        torch.set_default_dtype(torch.float64)
        try:
            got = latents_of(pipe, num_inference_steps=2, **draws())
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, want)


def test_images_a_prompt(made):
    pipe = made("sdxl")
    got = floats(pipe, ["a cat", "the dog"], num_images_per_prompt=2, seeds=[1, 2, 3, 4], num_inference_steps=1)
    want = floats(pipe, ["a cat", "a cat", "the dog", "the dog"], seeds=[1, 2, 3, 4], num_inference_steps=1)
    assert np.array_equal(got, want)


@EACH_KIND
def test_embeddings_in_place_of_prompts(made, kind):
    pipe = made(kind)
    text = PromptEncoder(pipe).encode(PROMPTS)
    given = {"prompt_embeds": text.states, "pooled_prompt_embeds": text.pooled}
    got = floats(pipe, None, seeds=[1, 2], num_inference_steps=2, **given)
    assert np.array_equal(got, floats(pipe, seeds=[1, 2], num_inference_steps=2))


def test_steps_and_noise_of_the_pipeline(made):
    pipe = fresh("sd15", num_inference_steps=2, noise_type="ddim")
    got = floats(pipe, seeds=[1, 2])
    assert np.array_equal(got, floats(made("sd15"), seeds=[1, 2], num_inference_steps=2, noise_type="ddim"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        floats(pipe, seeds=[1, 2], num_inference_steps=1)
    with pytest.warns(UserWarning, match="distilled for 2 steps at most, not 3"):
        floats(pipe, seeds=[1, 2], num_inference_steps=3)


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(made):
    pipe = made("sdxl")
    long = "the dog " * 10
    with pytest.warns(
        UserWarning, match=r"^prompt 'the dog .* \(and 1 more\) has 22 tokens, of which 16 are read"
    ) as record:
        got = floats(pipe, [long, "a cat", long + "red"], seeds=[1, 2, 3], num_inference_steps=1)
    assert len(record) == 1
    cut = floats(pipe, ["the dog " * 7, "a cat", "the dog " * 7], seeds=[1, 2, 3], num_inference_steps=1)
    assert np.array_equal(got, cut)


# ---- parts that change, and captures ----


def test_a_generation_is_one_launch_of_steps_and_decoder(captured, made):
    pipe, counts = captured
    for seed in (1, 2):
        got = pipe(PROMPTS[:1], num_inference_steps=2, seeds=seed).images[0]
        want = made("sd15")(PROMPTS[:1], num_inference_steps=2, seeds=seed).images[0]
        assert np.array_equal(np.asarray(got), np.asarray(want))
    assert counts() == {"captures": 1, "replays": 2, "graphs": 1}


def test_an_accelerated_pipeline(made, captured):
    pipe, counts = captured
    given = {"num_inference_steps": 2, "seeds": 1}
    before = floats(pipe, "a cat", **given)
    acceleration = accelerate(pipe)
    assert acceleration.changed
    with pytest.warns(GraphRecaptureWarning):
        assert np.abs(floats(pipe, "a cat", **given) - before).max() <= 1e-4
    assert counts()["captures"] == 2
    acceleration.restore()
    assert np.array_equal(floats(pipe, "a cat", **given), before) and counts()["captures"] == 3


def test_another_network_is_another_engine(made):
    pipe = fresh("sd15")
    first, engine = floats(pipe, seeds=[1, 2], num_inference_steps=1), pipe.engine
    assert pipe.engine is engine
    torch.manual_seed(9)
    pipe.unet = tiny.unet("sd15")
    assert pipe.engine is not engine
    assert np.abs(floats(pipe, seeds=[1, 2], num_inference_steps=1) - first).max() > 1e-2
    pipe.unet = tiny.unet("sdxl")
    with pytest.raises(SignFastError, match="embeddings of 16 numbers, the UNet takes 32"):
        floats(pipe, seeds=[1, 2], num_inference_steps=1)
    pipe.scheduler = None
    with pytest.raises(SignFastError, match="the scheduler is a NoneType, which is not supported"):
        floats(pipe, seeds=[1, 2], num_inference_steps=1)


# ---- refusals ----

ONE = {"prompt": "a cat", "num_inference_steps": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give prompts or prompt_embeds, one of them"),
        ({"prompt": []}, "prompt must be a text or a list of texts, one at least, not \\[\\]"),
        ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts"),
        ({"prompt": "\ud800"}, "prompts cannot be read as text"),
        ({"prompt_embeds": torch.zeros(1, 16, 16)}, "give prompts or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 8)}, r"prompt_embeds must be \(prompts, tokens, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 16, 16)}, r"prompt_embeds must be \(prompts, tokens, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, 16)}, r"prompt_embeds must be \(prompts, tokens, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.ones(1, 16, 16).int()}, r"floats, not \(1, 16, 16\) of torch.int32"),
        ({"pooled_prompt_embeds": torch.zeros(1, 3)}, "pooled_prompt_embeds go with prompt_embeds"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 16), "pooled_prompt_embeds": torch.zeros(1, 3)},
            "takes no pooled_prompt_embeds",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 to 625"),
        ({"num_inference_steps": 626}, "num_inference_steps must be 1 to 625"),
        ({"num_inference_steps": 1.5}, "num_inference_steps 1.5 is not a whole number"),
        ({"noise_type": "old"}, "noise_type must be fresh, fixed or ddim, not 'old'"),
        ({"height": 60}, "height must be a multiple of 8 pixels, not 60"),
        ({"width": 0}, "width must be a multiple of 8 pixels, not 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"output_type": "png"}, "output_type must be pil, np, pt or latent"),
        ({"guidance_scale": 7.5}, "takes no guidance"),
        ({"negative_prompt": "bad"}, "takes no guidance"),
        ({"callback_on_step_end": print}, "the steps are one launch"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents must be \(1, 4, 8, 8\)"),
        ({"latents": "z"}, "latents must be"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"seeds": 1.5}, "seed 1.5 is not a whole number"),
        ({"seeds": [1], "generator": torch.Generator()}, "give seeds or a generator"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"prompt": ["a", "b"], "generator": [torch.default_generator] * 2}, "a generator is there twice"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(made, changes, message):
    with pytest.raises(SignFastError, match=message) as caught:
        made("sd15")(**{**ONE, **changes})
    assert "\n" not in str(caught.value)


def test_pooled_embeddings_of_sdxl(made):
    for pooled in (None, torch.zeros(1, 5)):
        with pytest.raises(SignFastError, match=r"pooled_prompt_embeds must be \(1, 12\)"):
            made("sdxl")(None, prompt_embeds=torch.zeros(1, 16, 32), pooled_prompt_embeds=pooled)


def test_offloading_is_refused(made):
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        with pytest.raises(SignFastError, match="give prompt_embeds"):
            getattr(made("sd15"), name)()
