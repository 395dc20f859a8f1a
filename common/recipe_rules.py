"""What the parts of a recipe ask of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.fixed import secure_objection

if TYPE_CHECKING:
    from common.config import Recipe


def objection(recipe: Recipe) -> str | None:
    """Why parts that are good by themselves make no recipe together; None if they do."""
    task, model, privacy = recipe.task, recipe.model, recipe.privacy
    if model.dimensions != task.dimensions:
        return (
            f"model.dimensions is {model.dimensions} but task.dimensions is {task.dimensions}; "
            f"choose a {task.dimensions}D model"
        )
    if len(recipe.data.size) != task.dimensions:
        return f"data.size has {len(recipe.data.size)} axes but task.dimensions is {task.dimensions}"
    if why := recipe.data.swaps_sides(task.laterality_sensitive):
        return why
    weights = recipe.training.class_weights
    if isinstance(weights, tuple) and len(weights) != task.outputs:
        return f"training.class_weights has {len(weights)} numbers for {task.outputs} classes"
    if task.kind == "multilabel" and recipe.training.label_smoothing:
        return "training.label_smoothing is for single-label tasks"
    if recipe.federation.strategy == "fedprox" and recipe.training.proximal_mu == 0:
        return "federation.strategy=fedprox needs training.proximal_mu above 0"
    patience = recipe.federation.early_stopping.patience_rounds
    if patience and not recipe.evaluation.validation_fraction:
        return (
            f"federation.early_stopping.patience_rounds is {patience}, but evaluation.validation_fraction is 0: "
            "there is nothing to watch"
        )
    if privacy.active:
        if weights == "balanced":
            return "training.class_weights=balanced uses private counts; give fixed weights under privacy"
        if model.norm == "batch":
            return "model.norm=batch mixes patients; under privacy use group or auto"
        if recipe.federation.site_weights == "patients":
            return "federation.site_weights=patients releases exact counts; under privacy use equal"
        if patience:
            return (
                f"federation.early_stopping.patience_rounds is {patience}, but choosing the model by validation "
                "scores, which carry no noise, is outside the promise of epsilon; under privacy use 0"
            )
    if privacy.secure_aggregation and (why := secure_objection(recipe.federation)):
        return why
    return None
