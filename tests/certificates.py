"""Certificates for tests: an authority, leaves that it signs for this machine's loopback address, and a stack
that is asked by TLS."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiprune.stack import Stack
from hiprune.trust import Certificates

_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._own = self._sign(name, self._key, x509.BasicConstraints(ca=True, path_length=None))

    def write(self, folder: Path) -> tuple[str, str, str]:
        """Paths of a new certificate, its key and the authority's own, in place of those there."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        leaf = self._sign("leaf", key, x509.SubjectAlternativeName(names))
        contents = {
            "tls.crt": leaf.public_bytes(serialization.Encoding.PEM),
            "tls.key": key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            "ca.crt": self._own.public_bytes(serialization.Encoding.PEM),
        }
        for name, content in contents.items():
            (folder / f"{name}.new").write_bytes(content)
            (folder / f"{name}.new").replace(folder / name)
        certificate, private, authority = (str(folder / name) for name in contents)
        return certificate, private, authority

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class TlsStack(Stack):
    """A stack some of whose services, those in `addresses`, are asked by TLS whether they are ready."""

    certificates: Certificates
    """Of whoever asks."""
    addresses: dict[str, str]

    def wait_ready(self, service: str, timeout_s: float = 120) -> None:
        """As the stack's own, which knows no TLS."""
        if service not in self.addresses:
            super().wait_ready(service, timeout_s)
            return
        credentials = self.certificates.channel_credentials()
        with grpc.secure_channel(self.addresses[service], credentials) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def serves() -> bool:
                try:
                    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1)
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            self._wait(service, serves, timeout_s)
