"""Models without HTTP: listed, shown and deleted. A model of another owner does not exist: 404."""

from __future__ import annotations

from arbor_core.config.api_keys import DEFAULT_OWNER
from arbor_core.inference.engines import Engines
from arbor_core.models.catalog import Models, unknown

from . import objects

MAX_CHARS = 512


class ModelService:
    """The models of a server.

    Args:
        organization: Who owns them, as model objects say.
    """

    def __init__(self, models: Models, engines: Engines, organization: str) -> None:
        self.models, self.engines, self.organization = models, engines, organization

    def list_models(self, owner: str = DEFAULT_OWNER) -> objects.ModelList:
        """The models that answer here."""
        return objects.ModelList([objects.model_object(one, self.organization) for one in self.models.list(owner)])

    def show(self, name: str, owner: str = DEFAULT_OWNER) -> objects.Model:
        """A model as OpenAI's object.

        Raises:
            ApiError: 404.
        """
        return objects.model_object(self.models.get(plausible(name), owner), self.organization)

    async def delete(self, name: str, owner: str = DEFAULT_OWNER) -> objects.Deleted:
        """Forget a fine-tuned model, also where it is loaded; its job and checkpoints stay.

        Raises:
            ApiError: 404; it is no job's result; or a job trains on it.
        """
        await self.models.delete(plausible(name), owner)
        await self.engines.forget(name)
        return objects.Deleted(name, "model")


def plausible(name: str) -> str:
    """A name that a model may have.

    Raises:
        ApiError: 404: no model is called that.
    """
    if not 0 < len(name) <= MAX_CHARS or not name.isascii() or not name.isprintable():
        raise unknown(name)
    return name
