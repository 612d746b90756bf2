"""A cluster's certificates, and why a scheduler lets no client in: Dask says only that they don't match."""

import socket
import ssl
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from distributed import Security

from hpclab.cluster import steady

SECONDS = 5.0
"""How long a scheduler may take to greet."""
_ALERTS = {
    "CERTIFICATE_EXPIRED": "the certificate of this client (tls_client_cert) has expired",
    "UNKNOWN_CA": "the certificate of this client (tls_client_cert) is not signed by the scheduler's authority",
    "WRONG_VERSION_NUMBER": "it is not encrypted, so its address begins with tcp://",
}
"""What OpenSSL calls it, and what it means here."""
LATE, VALID = timedelta(days=1), timedelta(days=365)
"""How far another host's clock may be behind for it to accept a new certificate, and how long that is valid."""


def temporary() -> Security:
    """Make new certificates for one cluster, as `Security.temporary` does, which also hold where a clock is behind.

    Those of Dask begin in the second in which they are made: a worker whose clock is a minute behind gives up.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hpclab")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LATE)
        .not_valid_after(now + VALID)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    certificate = signed.public_bytes(pem).decode()
    secret = key.private_bytes(pem, pkcs8, serialization.NoEncryption()).decode()
    files = {"tls_ca_file": certificate}
    for role in ("client", "scheduler", "worker"):
        files |= {f"tls_{role}_cert": certificate, f"tls_{role}_key": secret}
    return steady.Security(require_encryption=True, **files)


def refusal(address: str, security: Security | None) -> str | None:
    """What a scheduler finds wrong with this client, or the client with it; None if nothing, or if nobody is there.

    Parameters
    ----------
    address : str
        Such as "tls://10.0.0.1:8786".
    security : Security or None
        None if nothing is to be encrypted.

    Raises
    ------
    ValueError
        If the address names no port.
    """
    host, _, port = address.rsplit("://", 1)[-1].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"where (={address!r}) must be an address with a port, such as 'tls://head:8786'.")
    try:
        context = security.get_connection_args("client")["ssl_context"] if security is not None else None
        if security is not None and context is None:
            return "security has no certificate of this client (tls_client_cert, tls_client_key)"
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as plain:
            plain.settimeout(SECONDS)
            with context.wrap_socket(plain, server_hostname=host) if context is not None else plain as caller:
                if not caller.recv(1):  # TLS 1.3 tells only now whether it takes the client's certificate
                    return "it closed the connection without answering"
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted by security.tls_ca_file: {error.verify_message}"
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        return next((meaning for alert, meaning in _ALERTS.items() if alert in reason), reason)
    except TimeoutError:
        unencrypted = "; if it is encrypted, its address begins with tls://" * (security is None)
        return f"nothing answers there within {SECONDS:g} s{unencrypted}"
    except FileNotFoundError as error:
        return f"a file of security isn't there: {error}"
    except socket.gaierror as error:
        return f"its host {host} isn't known here: {error.strerror}"
    except OSError:
        return None  # Dask waits for one that is about to start
    return None
