"""What lmms-eval asks an installed package: under which name its model is, and in which class."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """`--model ivtp`; tasks that rate given answers (`multiple_choice`) also need `--force_simple`."""
    return ModelManifest(
        model_id="ivtp",
        chat_class_path="ivtp.evaluation.lmms.IvtpModel",
        simple_class_path="ivtp.evaluation.lmms.IvtpSimpleModel",
    )
