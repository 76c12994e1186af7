"""The demo's stages and those of every other system, in the demo's run directory.

What the demo has trained is not trained again.  `python -m tests.benchmarks.systems runs/demo` then paints
with each of them and prints README's table.  Each system is also a recipe of its own name.
"""

from jobs.recipes import autoregressive, consistency, ddpm, demo, glide, guided, improved_ddpm, latent, unclip
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec

GUIDING = "guiding_clip"
"""The noised CLIP that guides `untold`, trained at that chain's noise levels; the demo's knows others."""


def run() -> RunSpec:
    """The demo's seven stages and twenty-four more, some three hours; two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return before.but(stages=(*before.stages, *others()))


def others() -> tuple[TrainSpec, ...]:
    """Every other stage, under a name that says whose it is."""
    teacher = improved_ddpm.base().but(name="improved_ddpm")
    talking = glide.guided().but(name="glide", parents={"start": "glide_base"})
    enlarger = glide.upsampler().but(name="glide_upsampler")
    told, reading = latent.base().but(name="latent"), latent.reading().but(name="latent_reading")
    book = {"clip": "clip", "autoencoder": "vq_autoencoder"}
    return (
        consistency.consistency(),
        autoregressive.prior(),
        teacher,
        guided.base().but(name="untold"),
        unclip.small().stage("decoder"),
        guided.noised_clip().but(name=GUIDING),
        guided.classifier(),
        glide.base().but(name="glide_base"),
        glide.noised_clip().but(name="glide_guide"),
        told,
        latent.vq().stage("autoencoder").but(name="vq_autoencoder"),
        talking,
        enlarger,
        ddpm.base().but(name="ddpm"),
        consistency.student_of_classes(teacher).but(name="class_student"),
        improved_ddpm.filling(teacher).but(name="class_filling"),
        ddpm.filling(talking, "glide_filling"),
        glide.filling_upsampler(enlarger).but(name="glide_filling_upsampler"),
        latent.filling(told).but(name="latent_filling"),
        reading,
        latent.jointly(reading).but(name="latent_joint"),
        told.but(name="latent_vq", parents=book),
        unclip.enlarging("blur").but(name="blurred_upsampler"),
        unclip.enlarging("bsr").but(name="bsr_upsampler"),
    )
