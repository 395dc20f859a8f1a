"""What we know of Flower 1.41 beyond its public API. Red after an update: read what changed, and mend both links."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib
import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.common import constant
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto import control_pb2, fleet_pb2, message_pb2, node_pb2, runtime_pb2, task_pb2
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.serverapp import Grid
from flwr.supercore import constant as core
from flwr.supercore import sql_mixin
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.retry import http_retry
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import main as superlink_main
from flwr.superlink.grid import HttpGrid
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers as superlink_runtime
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from starlette.middleware import Middleware

from client.link import supernode_child
from common.deployment import FederationPlan, ServerHome, SiteHome
from server import app as server_app
from server import link_layers
from server.gateway_rules import FLEET_ROUTES
from server.link import superlink_child
from server.provision import provision
from simulations import grid as simulated

ROOT = Path(__file__).parent.parent
LINKS = ("client/link.py", "server/link.py")
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation")
ALSO_PRIVATE = {"simulations/grid.py": {"flwr.supercore.run", "flwr.supercore.task_identity"}}
"""The simulation's own Grid and identity: no network, and nothing of the deployment."""


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def function(module: ModuleType, name: str) -> ast.FunctionDef:
    (found,) = (node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def flower_imports(path: Path) -> set[tuple[str, str]]:
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr"
        for alias in node.names
    }


def test_the_pinned_version_is_installed():
    assert version("flwr") == "1.41.0"
    assert "flwr==1.41.0" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("file", LINKS)
def test_every_name_that_we_import_is_there(file):
    names = flower_imports(ROOT / file)
    assert len(names) > 15
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_private_modules_are_used_in_the_two_links_alone():
    for room in ("common", "client", "server", "simulations"):
        for path in (ROOT / room).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            private = {module for module, _ in flower_imports(path)} - set(PUBLIC)
            if file not in LINKS:
                assert private <= ALSO_PRIVATE.get(file, set()), f"{file} imports {private}"


def test_the_calls_that_we_make_take_what_we_give():
    from flwr.cli.build import build_fab_from_files
    from flwr.supernode.runtime.run_clientapp import push_message

    assert parameters(build_fab_from_files) == ["files"]
    assert parameters(push_message) == ["client", "message", "context"]
    assert parameters(ClientApp.__call__) == ["self", "message", "context"]
    assert parameters(inflatable_utils.inflate_object_from_contents)[:2] == ["object_id", "object_contents"]
    assert {"max_time", "max_tries_per_object", "initial_backoff", "backoff_cap", "return_type"} <= set(
        parameters(inflatable_utils.pull_and_inflate_object_from_tree)
    )
    assert {"initial_backoff", "backoff_cap"} <= set(parameters(inflatable_utils.pull_objects))
    assert parameters(HttpGrid.__init__) == ["self", "runtime_api_address", "insecure", "root_certificates", "token"]
    for client in (ControlHttpClient, RuntimeHttpClient, FleetHttpClient):
        given = ["server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"]
        assert parameters(client.from_server_address) == given
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(TaskIdentity)))
    error = FlowerError.from_json('{"code": 2004, "detail": "no"}')
    assert error is not None
    assert (error.code, error.message) == (2004, "no")


@pytest.mark.parametrize(
    ("client", "calls"),
    [
        (ControlHttpClient, ("StartRun", "StopRun", "ListRuns", "RegisterNode", "UnregisterNode", "ListNodes")),
        (
            RuntimeHttpClient,
            (
                *("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat", "PullMessages"),
                *("PushMessages", "PullObject", "PushObject", "ConfirmMessageReceived", "GetNodes"),
            ),
        ),
        (FleetHttpClient, ("ActivateNode", "DeactivateNode", "PullMessages", "PushMessages")),
    ],
)
def test_the_clients_have_the_calls_that_we_make(client, calls):
    for name in calls:
        assert parameters(getattr(client, name)) == ["self", "request"]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (control_pb2.StartRunRequest, {"fab"}),
        (control_pb2.StartRunResponse, {"run_id"}),
        (control_pb2.StopRunRequest, {"run_id"}),
        (control_pb2.ListRunsRequest, {"run_id", "limit"}),
        (control_pb2.ListRunsResponse, {"run_dict"}),
        (control_pb2.RegisterNodeRequest, {"public_key", "name"}),
        (control_pb2.UnregisterNodeRequest, {"node_id"}),
        (control_pb2.ListNodesResponse, {"nodes_info"}),
        (node_pb2.NodeInfo, {"node_id", "name", "public_key", "status", "last_activated_at"}),
        (runtime_pb2.AcquireTaskRequest, {"supported_task_types"}),
        (runtime_pb2.AcquireTaskResponse, {"task", "token"}),
        (task_pb2.Task, {"run_id"}),
        (runtime_pb2.PullTaskInputResponse, {"context", "run", "fab", "task_id"}),
        (runtime_pb2.PullAppMessagesRequest, {"message_ids"}),
        (runtime_pb2.PullAppMessagesResponse, {"messages_list", "message_object_trees"}),
        (runtime_pb2.PushTaskOutputRequest, {"sub_status", "details"}),
        (message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"}),
        (runtime_pb2.PushAppMessagesRequest, {"messages_list", "message_object_trees"}),
        (runtime_pb2.PushAppMessagesResponse, {"objects_to_push", "session_id"}),
        (fleet_pb2.PushMessagesRequest, {"messages_list", "message_object_trees"}),
        (fleet_pb2.PushMessagesResponse, {"objects_to_push", "session_id"}),
        (fleet_pb2.PullMessagesResponse, {"messages_list", "message_object_trees"}),
        (message_pb2.ObjectTree, {"object_id", "children"}),
        (fleet_pb2.ActivateNodeRequest, {"public_key", "heartbeat_interval"}),
        (fleet_pb2.DeactivateNodeRequest, {"node_id"}),
    ],
)
def test_the_messages_have_the_fields_that_we_use(message, fields):
    assert fields <= set(message.DESCRIPTOR.fields_by_name)


def test_our_grid_overrides_what_flowers_has():
    assert issubclass(HttpGrid, Grid)
    source = inspect.getsource(HttpGrid)
    for name in ("_runtime_client", "self.node", "retry_invoker=self._retry_invoker", "def get_nodes", "def close"):
        assert name in source, name


def test_the_fleet_routes_are_those_that_the_gateway_lets_through():
    from flwr.superlink.routers.fleet.router import router

    flower = {
        (method, f"/v1/fleet/{route.path.rsplit('/', 1)[-1]}") for route in router.routes for method in route.methods
    }
    assert flower == FLEET_ROUTES
    client = inspect.getsource(FleetHttpClient)
    assert {path for _, path in flower} == {part for part in client.split('"') if part.startswith("/v1/fleet/")}


def test_the_numbers_that_we_know_are_flowers():
    assert simulated._CLIENT_FAILED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert server_app._NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE == 5
    assert ErrorCode.MESSAGE_UNAVAILABLE == 3
    assert ErrorCode.MOD_FAILED_PRECONDITION == 6
    assert ErrorCode.CLIENT_APP_CRASHED == 8
    assert ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED == 2004
    assert (SubStatus.COMPLETED, SubStatus.FAILED, Status.FINISHED) == ("completed", "failed", "finished")
    assert (NodeStatus.ONLINE, NodeStatus.UNREGISTERED) == ("online", "unregistered")
    assert (TaskType.SERVER_APP, TaskType.CLIENT_APP) == ("flwr-serverapp", "flwr-clientapp")
    assert constant.SUPERLINK_NODE_ID == 1
    # 60 s until a silent node, run or task is given up
    assert constant.HEARTBEAT_PATIENCE * constant.HEARTBEAT_DEFAULT_INTERVAL == 60
    assert core.OBJECT_PUSH_SESSION_TTL_SECONDS == 180
    assert not issubclass(RunNotRunningException, Exception)  # and so escapes `except Exception`


def test_a_nodes_clock_may_be_wrong_by_five_minutes_either_way_at_the_superlink():
    """`server/link.py:main` gives both numbers: -300 s < age < 305 s; the gateway in front of it takes 300 s."""
    check = ast.unparse(function(node_auth, "authenticate_node"))
    assert "-SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE" in check
    assert (node_auth.SYSTEM_TIME_TOLERANCE, node_auth.TIMESTAMP_TOLERANCE) == (5, 300)


def test_the_superlink_asks_our_lock_before_it_reads_anything():
    middleware = ast.unparse(function(superlink_main, "_get_middleware"))
    assert "return [*extensions.get_middleware()," in middleware
    assert "middleware=_get_middleware()" in ast.unparse(function(superlink_main, "create_app"))
    assert ControlHttpClient("https://localhost")._interceptors == ()
    assert all(path.startswith(link_layers.NODES) for _, path in FLEET_ROUTES)


def test_flowers_layers_ask_for_no_other_calls_than_we_give_them():
    listed = [part.cls for part in superlink_main._get_middleware()]
    names = {layer.__name__ for layer in listed}
    # What passes everything: the translator of errors and that of bodies.
    assert {name for name in names if not name.startswith(tuple(link_layers.APIS))} == {
        "BaseHTTPMiddleware", "ProtobufTranslationMiddleware",
    }  # fmt: skip
    asks = {
        "ControlSensitiveResponseMiddleware": "if _is_control_sensitive_route(request):",
        "ControlAuthenticationMiddleware": "if not _is_control_path(request.url.path) or ",
        "ControlLicenseMiddleware": "if self._license_plugin is None or not _is_control_path(request.url.path):",
        "ControlEventLogMiddleware": "if not _is_control_path(request.url.path) or ",
        "RuntimeTracingMiddleware": "isinstance(result, AcquireTaskResponse) and result.HasField('task')",
        "NodeAuthMiddleware": "if request.url.path.startswith('/v1/fleet/') and ",
        "FleetEventLogMiddleware": "if not request.url.path.startswith('/v1/fleet/'):",
    }
    for layer in listed:
        if layer.__name__ in asks:
            assert asks[layer.__name__] in ast.unparse(ast.parse(inspect.getsource(layer))), layer.__name__
            assert set(vars(layer)) & {"__call__"} == set()  # all its work is in `dispatch`
            room = re.match("Control|Runtime|NodeAuth|Fleet", layer.__name__)[0].replace("NodeAuth", "Fleet").lower()
            assert link_layers.Layer(None, Middleware(layer))._api == f"/v1/{room}/"
    assert len(asks) == len(names) - 2
    control = inspect.getmodule(next(layer for layer in listed if layer.__name__ == "ControlLicenseMiddleware"))
    assert all(path.startswith("/v1/control/") for _, path in control.CONTROL_SENSITIVE_ROUTE_KEYS)


def test_a_layer_sees_the_calls_of_its_api_and_no_others():
    seen: list[str] = []

    async def app(scope, receive, send):
        seen.append(f"app {scope.get('path', scope['type'])}")

    def NodeAuthMiddleware(inner):
        async def call(scope, receive, send):
            seen.append("layer")
            await inner(scope, receive, send)

        return call

    whole = link_layers.Layer(app, Middleware(NodeAuthMiddleware))
    for scope in (
        {"type": "http", "path": "/v1/fleet/pull-object"},
        {"type": "http", "path": "/v1/runtime/pull-object"},
        {"type": "lifespan"},
    ):
        asyncio.run(whole(scope, None, None))
    assert seen == ["layer", "app /v1/fleet/pull-object", "app /v1/runtime/pull-object", "layer", "app lifespan"]


def test_what_has_expired_is_looked_for_once_a_second(monkeypatch):
    core_state = sql_corestate.SqlCoreState
    assert parameters(core_state._cleanup_expired_task_tokens) == ["self"]
    # a token that expired meanwhile opens nothing all the same
    assert "row.active_until < current" in inspect.getsource(core_state.get_task_by_token)
    now, cleaned = [100.0], []
    monkeypatch.setattr(link_layers.time, "monotonic", lambda: now[0])
    clean = link_layers.seldom(cleaned.append)
    for at in (100.0, 100.5, 100.99, 101.0, 101.5, 102.5):
        now[0] = at
        clean(at)
    assert cleaned == [100.0, 101.0, 102.5]


def test_the_supernodes_loop_is_the_one_that_we_change():
    loop = start_client_internal
    sleeps = {
        ast.unparse(node)
        for node in ast.walk(tree(loop))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("time.")
    }
    assert sleeps == {"time.sleep(3)", "time.sleep(0.5)"}
    assert "time.sleep(3)" in ast.unparse(function(loop, "start_client_internal"))
    receive = ast.unparse(function(fleet_http_connection, "receive"))
    assert "retry_invoker.invoke(client.PullMessages, PullMessagesRequest(node=node))" in receive
    # A question counts as delivered before its answer has left: lost with it, it is never given out again.
    assert "MessageInsModel.delivered_at == ''" in ast.unparse(function(sql_linkstate, "_claim_message_ins_rows"))
    assert "pull_objects(" in ast.unparse(function(loop, "_pull_and_store_message"))
    assert "with http_request_response(address, insecure, root_certificates, authentication_keys," in ast.unparse(
        function(loop, "_init_connection")
    )
    assert parameters(fleet_http_connection.http_request_response)[:4] == [
        *("server_address", "insecure", "root_certificates", "authentication_keys"),
    ]
    (given,) = (
        node.value
        for node in ast.walk(function(fleet_http_connection, "http_request_response"))
        if isinstance(node, ast.Yield) and node.value is not None
    )
    assert ast.unparse(given) == (
        "(node.node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm_message_received)"
    )
    assert isinstance(http_retry._RETRYABLE_STATUS_CODES, frozenset)
    assert "_RETRYABLE_STATUS_CODES" in inspect.getsource(http_retry.make_simple_http_retry_invoker)


def test_a_task_is_there_before_its_message_and_a_reply_is_waited_for_without_end():
    pull = ast.unparse(function(start_client_internal, "_pull_and_store_message"))
    assert pull.index("state.create_task(") < pull.index("state.store_message(message)") < pull.index("pull_objects(")
    push = ast.unparse(function(start_client_internal, "_push_messages"))
    assert "while not (reply_messages := state.get_messages_legacy(is_reply=True))" in push
    assert "while (content := object_store.get(tree.object_id)) == b''" in push


def test_objects_can_go_with_a_message():
    for module in (fleet_handlers, superlink_runtime):
        assert parameters(module.push_messages)[:2] == parameters(module.pull_messages)[:2] == ["request", "state"]
    node = importlib.import_module("flwr.supernode.servicer.runtime.runtime_handlers")
    assert parameters(node.push_messages) == parameters(node.pull_messages) == ["request", "state", "task"]
    for state in (sql_corestate.SqlCoreState, in_memory_corestate.InMemoryCoreState):
        assert parameters(state.store_object) == ["self", "run_id", "session_id", "object_id", "object_content"]
        assert parameters(state.get_object) == ["self", "run_id", "object_id"]
    assert parameters(ObjectStore.delete) == ["self", "object_id"]
    # Given out once: what is pulled is marked, or deleted, before the answer leaves.
    fleet_pull = ast.unparse(function(fleet_handlers, "pull_messages"))
    assert "state.get_message_ins(node_id=node_id, limit=1)" in fleet_pull
    assert "delivered_at" in inspect.getsource(sql_linkstate.SqlLinkState._claim_message_ins_rows)
    assert "state.delete_messages(message_ins_ids=message_ins_ids_to_delete)" in ast.unparse(
        function(superlink_runtime, "pull_messages")
    )
    # A session inside another one is the same transaction.
    assert "if existing is not None:\n        yield existing" in ast.unparse(function(sql_mixin, "session"))
    # Looked up at each call, where we have put ours.
    fleet = inspect.getsource(importlib.import_module("flwr.superlink.routers.fleet.router"))
    runtime = inspect.getsource(importlib.import_module("flwr.supercore.routers.runtime.router"))
    for name in ("push_messages", "pull_messages"):
        assert f"fleet_handlers.{name}(" in fleet
        assert f"handlers.{name}(request, state, task)" in runtime
    loop = ast.unparse(function(start_client_internal, "start_client_internal"))
    assert "_push_messages(state=state, object_store=store, send=send, push_object=push_object)" in loop
    assert inflatable_object.get_object_id(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_proxy_of_the_environment_is_taken_for_the_gateway():
    import httpx

    assert inspect.signature(httpx.Client.__init__).parameters["trust_env"].default is True
    assert "trust_env" not in inspect.getsource(importlib.import_module("flwr.supercore.protobuf.client"))


def test_flowers_programs_know_the_options_that_we_give(tmp_path):
    provision(FederationPlan(name="toy", host="127.0.0.1", sites=("east",)), tmp_path / "kits")
    for program, child in (
        ("flower-superlink", superlink_child(ServerHome(tmp_path / "kits" / "coordinator"), 9000)),
        ("flower-supernode", supernode_child(SiteHome(tmp_path / "kits" / "east"), 9001)),
    ):
        said = subprocess.run(
            [Path(sys.executable).with_name(program), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        ).stdout
        options = [word for word in child.command if word.startswith("--")]
        assert len(options) >= 6
        for option in options:
            assert f"{option} " in said or f"{option}\n" in said, option
        assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_superlink_without_a_question_answers_nothing_at_all():
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.superlink.servicer.fleet.fleet_handlers import pull_messages

    class Idle:
        def get_message_ins(self, node_id: int, limit: int) -> list[object]:
            assert limit == 1
            return []

    idle: Any = Idle()  # the gateway takes any byte for a question, which a node may answer
    assert pull_messages(PullMessagesRequest(), idle, idle).SerializeToString() == b""
