"""`/v1/models`: list, show and delete models. A model's name may have slashes, raw or as %2F."""

from __future__ import annotations

from litestar import delete, get

from arbor_core.application import objects
from arbor_core.application.system import Arbor
from arbor_core.server.http.auth import ANY, TRAIN
from arbor_core.server.http.openapi import described

MODEL = "/v1/models/{model:path}"


@get("/v1/models", operation_id="listModels", opt=described("List the models that answer here.", scopes=ANY))
async def list_models(arbor: Arbor, owner: str) -> objects.ModelList:
    return arbor.model_service.list_models(owner)


@get(MODEL, operation_id="retrieveModel", opt=described("Retrieve a model's description.", scopes=ANY))
async def retrieve_model(model: str, arbor: Arbor, owner: str) -> objects.Model:
    return arbor.model_service.show(model.removeprefix("/"), owner)


@delete(MODEL, operation_id="deleteModel", status_code=200, opt=described("Delete a fine-tuned model.", scopes=TRAIN))
async def delete_model(model: str, arbor: Arbor, owner: str) -> objects.Deleted:
    return await arbor.model_service.delete(model.removeprefix("/"), owner)


ROUTES = [list_models, retrieve_model, delete_model]
