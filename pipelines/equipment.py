"""What a plan's workers and its sink are equipped with: exactly the weights, adapters and signer it was made for."""

from __future__ import annotations

from typing import Any

from ldm_ops.describe import PROMPT_ENCODERS, ModelFacts
from pipelines.adapters import ADAPTERS, StageAdapters, adapter_settings, identify_adapters
from pipelines.embeddings_file import EmbeddingsHead
from pipelines.errors import JobError
from pipelines.job import Job
from pipelines.latents_file import LatentsHead
from pipelines.plans import Plan, same_settings
from pipelines.signing import Signer
from pipelines.stages import AnyStage, EmbedStage, EncodeStage
from pipelines.weights import Weights, identify


def signer(job: Job, plan: Plan) -> Signer | None:
    """Who signs the plan's pictures: the job says now, as no plan records it.

    Raises:
        JobError: the plan's are signed, and the job names nobody.
    """
    if not plan.settings.get("sink.c2pa"):
        return None
    if job.sink.c2pa is None:
        raise JobError(f"sink.c2pa: the pictures of plan {plan.plan_id} are signed; give certificate and private_key")
    return Signer(job.sink.c2pa)


def encoder_of(stage: AnyStage, weights: Weights, facts: ModelFacts) -> LatentsHead | EmbeddingsHead | None:
    """What latents or text embeddings say of the encoder that made them, but for shapes; None of another stage."""
    if isinstance(stage, EmbedStage):
        return EmbeddingsHead(
            encoder=weights.name,
            encoder_revision=weights.revision,
            pipeline=facts.pipeline,
            dtype=stage.store_dtype,
            masked="prompt_attention_mask" in PROMPT_ENCODERS[facts.pipeline],
            max_sequence_length=stage.max_sequence_length,
        )
    if not isinstance(stage, EncodeStage):
        return None
    return LatentsHead(
        encoder=weights.name,
        encoder_revision=weights.revision,
        posterior=stage.posterior,
        dtype="",
        shape=(0, 0, 0),
        scale=facts.latent_scale,
        shift=facts.latent_shift,
        factor=facts.latent_factor,
    )


def plan_models(
    plan: Plan, own: Job, known: list[tuple[Weights, ModelFacts]], storage_options: dict[str, Any]
) -> list[tuple[Weights, ModelFacts]]:
    """The weights that a plan was made for, of each of its stages.

    Raises:
        JobError: they are no longer what they were.
    """
    at_hand = {(weights.revision, weights.parts): (weights, facts) for weights, facts in known}
    models = []
    for i, stage in enumerate(own.stages):
        wanted = plan.settings[f"stages.{i}.model_revision"]
        found = at_hand.get((wanted, stage.parts)) or identify(
            stage.model, stage.revision, stage.variant, storage_options, stage.parts
        )
        if found[0].revision != wanted:
            raise JobError(
                f"model {stage.model} has changed since plan {plan.plan_id} was made ({wanted}, now "
                f"{found[0].revision}); put the old weights back, or choose a new sink.path"
            )
        models.append(found)
    return models


def plan_adapters(
    plan: Plan,
    own: Job,
    known: list[StageAdapters],
    models: list[tuple[Weights, ModelFacts]],
    storage_options: dict[str, Any],
) -> list[StageAdapters]:
    """The adapters that a plan was made for, of each of its stages.

    Raises:
        JobError: they are no longer what they were.
    """
    wanted = {name: value for name, value in plan.settings.items() if ADAPTERS in name}

    def fits(adapters: list[StageAdapters]) -> bool:
        return len(adapters) == len(own.stages) and same_settings(wanted, adapter_settings(adapters))

    if fits(known):
        return known
    found = [
        identify_adapters(i, stage, facts, storage_options)
        for i, (stage, (_, facts)) in enumerate(zip(own.stages, models, strict=True))
    ]
    if not fits(found):
        now = adapter_settings(found)
        changed = [name for name in sorted(wanted.keys() | now) if wanted.get(name) != now.get(name)]
        raise JobError(
            f"{', '.join(changed).replace(ADAPTERS, '.')}: changed since plan {plan.plan_id} was made; put back what "
            "was there then, or choose a new sink.path"
        )
    return found
