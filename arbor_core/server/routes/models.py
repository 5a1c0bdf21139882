"""`/v1/models`: list, show and delete models. A model's name may have slashes, raw or as %2F."""

from __future__ import annotations

from litestar import delete, get

from arbor_core.application import objects
from arbor_core.application.system import Arbor
from arbor_core.models.catalog import unknown
from arbor_core.server.http.auth import ANY, TRAIN
from arbor_core.server.http.openapi import described

MODEL = "/v1/models/{model:path}"


@get("/v1/models", operation_id="listModels", opt=described("List the models that answer here.", scopes=ANY))
async def list_models(arbor: Arbor, owner: str) -> objects.ModelList:
    organization = arbor.settings.organization
    return objects.ModelList([objects.model_object(model, organization) for model in arbor.models.list(owner)])


@get(MODEL, operation_id="retrieveModel", opt=described("Retrieve a model's description.", scopes=ANY))
async def retrieve_model(model: str, arbor: Arbor, owner: str) -> objects.Model:
    return objects.model_object(arbor.models.get(name_in(model), owner), arbor.settings.organization)


@delete(MODEL, operation_id="deleteModel", status_code=200, opt=described("Delete a fine-tuned model.", scopes=TRAIN))
async def delete_model(model: str, arbor: Arbor, owner: str) -> objects.Deleted:
    name = name_in(model)
    await arbor.models.delete(name, owner)
    await arbor.engines.forget(name)
    return objects.Deleted(name, "model")


def name_in(path: str) -> str:
    """The model's name in the path of a URL.

    Raises:
        ApiError: 404: no model is called that.
    """
    name = path.removeprefix("/")
    if not 0 < len(name) <= 512 or not name.isascii() or not name.isprintable():
        raise unknown(name)
    return name


ROUTES = [list_models, retrieve_model, delete_model]
