"""Whether a scheduler lets a client in, and if not, why: Dask says no more than that certificates don't match."""

import socket
import ssl

from distributed import Security

SECONDS = 5.0
"""How long a scheduler may take to greet."""
_ALERTS = {
    "CERTIFICATE_EXPIRED": "the certificate of this client (tls_client_cert) has expired",
    "UNKNOWN_CA": "the certificate of this client (tls_client_cert) is not signed by the scheduler's authority",
    "WRONG_VERSION_NUMBER": "it is not encrypted, so its address begins with tcp://",
}
"""What OpenSSL calls it, and what it means here."""


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
                    return "it closed the connection without a word"
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted by security.tls_ca_file: {error.verify_message}"
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        return next((meaning for alert, meaning in _ALERTS.items() if alert in reason), reason)
    except TimeoutError:
        unencrypted = "; if it is encrypted, its address begins with tls://" * (security is None)
        return f"nobody greets there within {SECONDS:g} s{unencrypted}"
    except FileNotFoundError as error:
        return f"a file of security isn't there: {error}"
    except socket.gaierror as error:
        return f"its host {host} isn't known here: {error.strerror}"
    except OSError:
        return None  # Dask waits for one that is about to start
    return None
