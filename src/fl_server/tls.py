"""Certificates of both ports, read again when their files change; and a private CA for whoever has none.

New files that do not fit together (one is written after the other) are passed over until they do: the former ones stay.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import Invalid

logger = logging.getLogger(__name__)
_CA_DAYS, _DAYS = 3650, 397  # browsers and Apple accept no longer ones
_RENEW_DAYS = 30
_ALPN = ["http/1.1"]


@dataclass(slots=True)
class Certificates:
    """Raises Invalid if the files cannot be used when it is made."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    _read: tuple[tuple[int, ...], ssl.SSLContext, bytes, bytes, bytes | None] = field(init=False, repr=False)
    _refused: tuple[int, ...] = field(init=False, repr=False, default=())  # of files that did not fit

    def __post_init__(self) -> None:
        try:
            self._read = self._reading(self._changed())
        except (OSError, ssl.SSLError) as wrong:
            raise Invalid(f"tls_cert, tls_key, tls_client_ca: {self._names()}: {_why(wrong)}") from None

    def context(self) -> ssl.SSLContext:
        """For a server that keeps it: each new connection gets the newest certificate."""
        context = self._read[1]
        context.sni_callback = self._with_newest
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server: likewise."""
        shown = self._configuration()
        seen = [self._read[0]]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            self._refresh()
            if seen[0] == self._read[0]:
                return None
            seen[0] = self._read[0]
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(shown, fetch, self.client_ca is not None)  # type: ignore[arg-type]

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        _, _, certificate, key, client_ca = self._read
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)

    def _with_newest(self, connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        self._refresh()
        if connection.context is not self._read[1]:
            connection.context = self._read[1]

    def _refresh(self) -> None:
        try:
            changed = self._changed()
            if changed in (self._read[0], self._refused):
                return
        except OSError:
            return  # a file is being replaced
        try:
            self._read = self._reading(changed)
            logger.info("certificates read again", extra={"files": self._names()})
        except (OSError, ssl.SSLError) as wrong:
            self._refused = changed
            logger.warning("new certificates not used", extra={"files": self._names(), "reason": _why(wrong)})

    def _files(self) -> list[Path]:
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]

    def _names(self) -> str:
        return ", ".join(map(str, self._files()))

    def _changed(self) -> tuple[int, ...]:
        """Differs when a file has changed."""
        stats = [path.stat() for path in self._files()]
        return tuple(number for found in stats for number in (found.st_mtime_ns, found.st_ino, found.st_size))

    def _reading(self, changed: tuple[int, ...]) -> tuple[tuple[int, ...], ssl.SSLContext, bytes, bytes, bytes | None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(_ALPN)
        context.load_cert_chain(self.certificate, self.key, password=_no_password)
        client_ca = None
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            client_ca = self.client_ca.read_bytes()
            context.num_tickets = 0  # who comes back with one would not be asked for a certificate again
            context.options |= ssl.OP_NO_TICKET
        return changed, context, self.certificate.read_bytes(), self.key.read_bytes(), client_ca


def _no_password() -> str:
    raise ssl.SSLError("the private key is encrypted")


def _why(wrong: OSError) -> str:
    if isinstance(wrong, ssl.SSLError):
        return wrong.reason or str(wrong)
    return wrong.strerror or str(wrong)


# ---- a private CA


@dataclass(frozen=True, slots=True)
class Made:
    certificate: Path
    key: Path
    ca: Path  # what clients are given as --tls-ca


def private_certificates(folder: Path, names: list[str]) -> Made:
    """A CA and a certificate for these hosts and addresses, and for this machine; made where they are not there yet.

    Raises Invalid; never makes a CA in the place of another, whose key may be kept elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = Made(folder / "server.pem", folder / "server-key.pem", folder / "ca.pem")
    ca_key_path = folder / "ca-key.pem"
    hosts = sorted({name for name in (*names, "localhost", "127.0.0.1", "::1", socket.gethostname()) if name})
    if made.ca.exists() and _is_good(made, hosts):
        return made
    if not made.ca.exists():
        ca_key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"flserve of {socket.gethostname()}"[:64])])
        _write_key(ca_key_path, ca_key)
        _write(made.ca, _pem(_certificate(name, name, ca_key, ca_key, [], _CA_DAYS)))
    try:
        ca, loaded = _read_certificate(made.ca), _read_key(ca_key_path)
    except (OSError, ValueError) as wrong:
        why = f"{made.ca}, {ca_key_path}: both are needed to sign a certificate for {', '.join(hosts)}"
        raise Invalid(f"tls: {why}: {wrong}") from None
    if ca.public_key() != loaded.public_key():
        raise Invalid(f"tls: {ca_key_path} is not the key of {made.ca}")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[-1][:64])])
    _write_key(made.key, key)
    _write(made.certificate, _pem(_certificate(subject, ca.subject, key, loaded, hosts, _DAYS)))
    return made


def _is_good(made: Made, hosts: list[str]) -> bool:
    """Whether it names them all, goes with its key and its CA, and lasts."""
    try:
        certificate, key, ca = _read_certificate(made.certificate), _read_key(made.key), _read_certificate(made.ca)
        certificate.verify_directly_issued_by(ca)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    has = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    fits = certificate.public_key() == key.public_key() and all(_general(host) in list(has) for host in hosts)
    return fits and left.days >= _RENEW_DAYS


def _read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key of another kind")
    return key


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except UnicodeError:
        raise Invalid(f"tls: {host[:100]!r} cannot stand in a certificate") from None


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    hosts: list[str],
    days: int,
) -> x509.Certificate:
    """No hosts: a CA."""
    is_ca, now = not hosts, datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general(host) for host in hosts])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(names, critical=False).add_extension(usage, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _write(path, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    part.replace(path)
