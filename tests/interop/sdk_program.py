"""What a user writes on the SDK that is generated from our OpenAPI document, in an environment without flserve.

sdk_program.py start <url> <seed.npz>: prints the session's id.  sdk_program.py download <url> <session id> <file>.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flserve_client import Client
from flserve_client.api.models import add_model, download_model, list_models
from flserve_client.api.sessions import create_session, explain_session, get_session_by_id, start_session
from flserve_client.models import AddModelBody, CreateSession, Failure, SessionConfigBody, StartSession
from flserve_client.types import File

command, url, what, *rest = sys.argv[1:]
with Client(base_url=url, timeout=60) as server:
    if command == "start":
        with Path(what).open("rb") as file:
            seed = add_model.sync(client=server, body=AddModelBody(file=File(payload=file, file_name="seed.npz")))
        config = SessionConfigBody(model_id=seed.model_id, rounds=2, clients_required=1, validate=False)
        refused = create_session.sync(
            client=server, body=CreateSession(session_config=SessionConfigBody(model_id="none"))
        )
        assert isinstance(refused, Failure) and refused.message == "model_id: no model none", refused
        session = create_session.sync(client=server, body=CreateSession(session_config=config, name="by an SDK"))
        wanted = StartSession(session_id=session.session_id, wait_for_clients_s=30)
        started = start_session.sync(client=server, body=wanted)
        assert started.message == "Session started", started
        assert explain_session.sync(session.session_id, client=server).sentences
        print(session.session_id)
    else:
        session = get_session_by_id.sync(what, client=server)
        assert session.status == "Finished", session
        page = list_models.sync(client=server, x_limit=1)
        assert page.count == 3 and page.result[0].model_id == session.session_config.model_id, page
        model = download_model.sync(session.session_config.model_id, client=server)
        Path(rest[0]).write_bytes(model.payload.getvalue())
