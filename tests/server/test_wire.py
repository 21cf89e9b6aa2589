"""The wire is FEDn 0.33's: every service, method, message, field and enum of its tables, with the same numbers. What is
ours has numbers from 100. The tables are those of FEDn's protocol, written by hand: not made from our own proto."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from fl_client.wire import fl_pb2 as pb

# service: method(request) -> reply; "stream" where it is one
SERVICES = """
ModelService: Upload(stream ModelRequest) -> ModelResponse
ModelService: Download(ModelRequest) -> stream ModelResponse
Control: Start(ControlRequest) -> ControlResponse
Control: Stop(ControlRequest) -> ControlResponse
Control: FlushAggregationQueue(ControlRequest) -> ControlResponse
Control: SetAggregator(ControlRequest) -> ControlResponse
Control: SetServerFunctions(ControlRequest) -> ControlResponse
Reducer: GetGlobalModel(GetGlobalModelRequest) -> GetGlobalModelResponse
Connector: AllianceStatusStream(ClientAvailableMessage) -> stream Status
Connector: SendStatus(Status) -> Response
Connector: ListActiveClients(ListClientsRequest) -> ClientList
Connector: AcceptingClients(ConnectionRequest) -> ConnectionResponse
Connector: SendHeartbeat(Heartbeat) -> Response
Connector: ReassignClient(ReassignRequest) -> Response
Connector: ReconnectClient(ReconnectRequest) -> Response
Combiner: TaskStream(ClientAvailableMessage) -> stream TaskRequest
Combiner: SendModelUpdate(ModelUpdate) -> Response
Combiner: SendModelValidation(ModelValidation) -> Response
Combiner: SendModelPrediction(ModelPrediction) -> Response
Combiner: SendBackwardCompletion(BackwardCompletion) -> Response
Combiner: SendModelMetric(ModelMetric) -> Response
Combiner: SendAttributeMessage(AttributeMessage) -> Response
Combiner: SendTelemetryMessage(TelemetryMessage) -> Response
FunctionService: HandleProvidedFunctions(ProvidedFunctionsRequest) -> ProvidedFunctionsResponse
FunctionService: HandleClientConfig(stream ClientConfigRequest) -> ClientConfigResponse
FunctionService: HandleClientSelection(ClientSelectionRequest) -> ClientSelectionResponse
FunctionService: HandleMetadata(ClientMetaRequest) -> ClientMetaResponse
FunctionService: HandleStoreModel(stream StoreModelRequest) -> StoreModelResponse
FunctionService: HandleAggregation(AggregationRequest) -> stream AggregationResponse
"""

# message: fields in the order of their numbers from 1; a field without a type is a string
MESSAGES = """
Client: role Role, name, client_id
Response: sender Client, response
Status: sender Client, status, log_level LogLevel, data, correlation_id, timestamp Timestamp, type StatusType, extra, session_id
TaskRequest: sender Client, receiver Client, model_id, data, correlation_id, timestamp, meta, session_id, type StatusType
ModelUpdate: sender Client, receiver Client, model_id, model_update_id, correlation_id, timestamp, meta, config
ModelValidation: sender Client, receiver Client, model_id, data, correlation_id, timestamp Timestamp, meta, session_id
ModelPrediction: sender Client, receiver Client, model_id, data, correlation_id, timestamp Timestamp, meta, prediction_id
BackwardCompletion: sender Client, receiver Client, gradient_id, correlation_id, session_id, timestamp Timestamp, meta
ModelMetric: sender Client, metrics repeated MetricElem, timestamp Timestamp, step UInt32Value, model_id, round_id, session_id
MetricElem: key, value float
AttributeMessage: sender Client, attributes repeated AttributeElem, timestamp Timestamp
AttributeElem: key, value
TelemetryMessage: sender Client, telemetries repeated TelemetryElem, timestamp Timestamp
TelemetryElem: key, value float
ModelRequest: sender Client, receiver Client, data bytes, id, status ModelStatus
ModelResponse: data bytes, id, status ModelStatus, message
GetGlobalModelRequest: sender Client, receiver Client
GetGlobalModelResponse: sender Client, receiver Client, model_id
Heartbeat: sender Client, memory_utilisation float, cpu_utilisation float
ClientAvailableMessage: sender Client, data, timestamp
ListClientsRequest: sender Client, channel Queue
ClientList: client repeated Client
ReassignRequest: sender Client, receiver Client, server, port uint32
ReconnectRequest: sender Client, receiver Client, reconnect uint32
Parameter: key, value
ControlRequest: command Command, parameter repeated Parameter
ControlResponse: message, parameter repeated Parameter
ConnectionRequest:
ConnectionResponse: status ConnectionStatus
ProvidedFunctionsRequest: function_code
ProvidedFunctionsResponse: available_functions map<string,bool>
ClientConfigRequest: data bytes
ClientConfigResponse: client_settings
ClientSelectionRequest: client_ids
ClientSelectionResponse: client_ids
ClientMetaRequest: metadata, client_id
ClientMetaResponse: status
StoreModelRequest: data bytes, id
StoreModelResponse: status
AggregationRequest: aggregate
AggregationResponse: data bytes
"""  # noqa: E501

# enum: values in the order of their numbers from 0
ENUMS = """
StatusType: LOG MODEL_UPDATE_REQUEST MODEL_UPDATE MODEL_VALIDATION_REQUEST MODEL_VALIDATION MODEL_PREDICTION NETWORK FORWARD_REQUEST FORWARD BACKWARD_REQUEST BACKWARD
LogLevel: NONE INFO DEBUG WARNING ERROR AUDIT
Queue: DEFAULT TASK_QUEUE
ModelStatus: OK IN_PROGRESS IN_PROGRESS_OK FAILED UNKNOWN
Role: OTHER CLIENT COMBINER REDUCER
Command: IDLE START PAUSE STOP RESET REPORT
ConnectionStatus: NOT_ACCEPTING ACCEPTING TRY_AGAIN_LATER
"""  # noqa: E501

OUR_FIRST_NUMBER = 100
OURS = {
    "Response": {100: "verdict Verdict", 101: "reason"},
    "TaskRequest": {100: "task_id", 101: "round uint32", 102: "attempt uint32", 103: "deadline double", 104: "helper"},
    "ModelUpdate": {100: "task_id", 101: "size_bytes uint64", 102: "sha256", 103: "failure"},
    "ModelValidation": {100: "task_id", 101: "failure"},
}
OUR_ENUMS = {"Verdict"}
SCALARS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("string", "bytes", "float", "double", "uint32", "uint64", "bool")
}
FILE: Any = pb.DESCRIPTOR


def table(text: str) -> dict[str, str]:
    lines = [line.partition(":") for line in text.strip().splitlines()]
    return {name: rest.strip() for name, _, rest in lines}


def field_text(field: Any) -> str:
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"{field.name} map<{type_name(key)},{type_name(value)}>"
    repeated = "repeated " if field.label == FieldDescriptor.LABEL_REPEATED else ""
    return f"{field.name} {repeated}{type_name(field)}".removesuffix(" string")


def type_name(field: Any) -> str:
    declared = field.message_type or field.enum_type
    return declared.name if declared else SCALARS[field.type]


def test_the_package_is_fedns() -> None:
    assert FILE.package == "fedn"


def test_services_and_methods_are_fedns() -> None:
    def stream(is_stream: bool) -> str:
        return "stream " if is_stream else ""

    ours = [
        f"{service.name}: {method.name}({stream(method.client_streaming)}{method.input_type.name})"
        f" -> {stream(method.server_streaming)}{method.output_type.name}"
        for service in FILE.services_by_name.values()
        for method in service.methods
    ]
    assert sorted(ours) == sorted(SERVICES.strip().splitlines())


def test_messages_have_fedns_fields_under_their_numbers_and_ours_from_100() -> None:
    for name, fields in table(MESSAGES).items():
        wanted = dict(enumerate(filter(None, fields.split(", ")), start=1)) | OURS.get(name, {})
        assert {field.number: field_text(field) for field in FILE.message_types_by_name[name].fields} == wanted, name
    assert set(FILE.message_types_by_name) == set(table(MESSAGES))
    assert min(number for ours in OURS.values() for number in ours) >= OUR_FIRST_NUMBER


def test_enums_have_fedns_values_and_ours_takes_no_name_of_them() -> None:
    for name, values in table(ENUMS).items():
        numbers = {value: number for number, value in enumerate(values.split())}
        assert {value.name: value.number for value in FILE.enum_types_by_name[name].values} == numbers, name
    assert set(FILE.enum_types_by_name) == set(table(ENUMS)) | OUR_ENUMS
    taken = {value for values in table(ENUMS).values() for value in values.split()}
    assert all(value.name not in taken for value in FILE.enum_types_by_name["Verdict"].values)


def test_timestamps_and_wrappers_are_googles() -> None:
    status, metric = FILE.message_types_by_name["Status"], FILE.message_types_by_name["ModelMetric"]
    assert status.fields_by_name["timestamp"].message_type.full_name == "google.protobuf.Timestamp"
    assert metric.fields_by_name["step"].message_type.full_name == "google.protobuf.UInt32Value"
