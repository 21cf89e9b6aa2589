"""Every error that crosses a floor; the type says what the caller can do.

FlserveError(message)            code: stable, for machines ("conflict")
  RequestError                   the caller's fault: change the request
    Invalid                      422  a field is wrong; the message begins with its name
    NotFound                     404  no such thing
    Conflict                     409  not now: the thing is in another state
    Unauthorized                 401  who are you?
    Forbidden                    403  we know who you are: not you
    TooMany                      429  not so many, not so often
  StoreError                     the store's fault
    Unavailable                  503  away, or its answer did not come: it may have happened, and may be done again
    Missing                      404  the bytes under this key are gone
    Corrupt                      500  there, but unreadable: do not try again
    Owned                        -    another process owns the store; it is named
    Deposed                      -    another process took the store over: promise nothing more

Expected outcomes are values (core.model.Verdict, FAILED(reason)), not errors; a broken invariant is an AssertionError.
"""

from __future__ import annotations

import grpc


class FlserveError(Exception):
    code = "error"
    http_status = 500
    grpc_status = grpc.StatusCode.INTERNAL


class RequestError(FlserveError):
    code = "request"
    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT


class Invalid(RequestError):
    code = "invalid"
    http_status = 422


class NotFound(RequestError):
    code = "not_found"
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class Conflict(RequestError):
    code = "conflict"
    http_status = 409
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class Unauthorized(RequestError):
    code = "unauthorized"
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(RequestError):
    code = "forbidden"
    http_status = 403
    grpc_status = grpc.StatusCode.PERMISSION_DENIED


class TooMany(RequestError):
    code = "too_many"
    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED


class StoreError(FlserveError):
    code = "store"


class Unavailable(StoreError):
    code = "unavailable"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE


class Missing(StoreError):
    code = "missing"
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class Corrupt(StoreError):
    code = "corrupt"
    grpc_status = grpc.StatusCode.DATA_LOSS


class Owned(StoreError):
    code = "owned"


class Deposed(StoreError):
    code = "deposed"
