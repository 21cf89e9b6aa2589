"""A client on FEDn's SDK, as a user of FEDn writes it: FednClient with train, validate and predict callbacks.

Run in FEDn's environment: fedn_program.py <JSON> with api_url, client_id, shift, num_examples, token, fail_at_train.
"""

from __future__ import annotations

import io
import json
import sys

import numpy as np
from fedn.network.clients.fedn_client import ConnectToApiResult, FednClient

said = json.loads(sys.argv[1])


def is_binary(model: io.BytesIO) -> bool:
    """FEDn's binaryhelper: 64-bit floats and nothing else; an npz is a zip."""
    return not model.getvalue().startswith(b"PK")


def read(model: io.BytesIO) -> dict[str, np.ndarray]:
    model.seek(0)
    if is_binary(model):
        return {"0": np.frombuffer(model.getvalue())}
    with np.load(model) as layers:
        return {name: layers[name] for name in layers.files}


def mean(layers: dict[str, np.ndarray]) -> float:
    return float(np.mean(np.concatenate([layer.reshape(-1) for layer in layers.values()])))


def train(model: io.BytesIO, settings: dict[str, object]) -> tuple[io.BytesIO, dict[str, object]]:
    if said.get("fail_at_train"):
        raise RuntimeError("this callback fails")
    layers = read(model)
    client.log_metric({"loss": 0.0, "shift": said["shift"]})
    client.log_metric({"loss": 0.25}, step=7)
    client.log_attributes({"rounds_seen": str(settings), "note": ""})
    client.log_telemetry({"battery": 0.0})
    trained = {name: layer + np.float32(said["shift"]) for name, layer in layers.items()}
    out = io.BytesIO(trained["0"].tobytes()) if is_binary(model) else io.BytesIO()
    if not is_binary(model):
        np.savez(out, **trained)
        out.seek(0)
    return out, {"training_metadata": {"num_examples": said["num_examples"]}}


def validate(model: io.BytesIO) -> dict[str, float]:
    return {"mean": mean(read(model)), "zero": 0.0}


def predict(model: io.BytesIO) -> dict[str, object]:
    return {"client": said["client_id"], "mean": mean(read(model))}


client = FednClient(train_callback=train, validate_callback=validate, predict_callback=predict)
name = f"name of {said['client_id']}"
wanted = {"name": name, "client_id": said["client_id"], "package": "local", "preferred_combiner": ""}
result, combiner = client.connect_to_api(f"{said['api_url']}/", said.get("token"), wanted)
assert result is ConnectToApiResult.Assigned, combiner
itself = said.get("calls_itself") or said["client_id"]
assert client.init_grpchandler(config=combiner, client_name=itself, token=said.get("token"))
client.log_attributes({"site": name, "empty": ""})
client.run()
