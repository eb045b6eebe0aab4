"""Certificates for tests, made by the openssl command."""

import subprocess
from pathlib import Path


def make_certificate(directory: Path, name: str, *, password: str = "") -> tuple[Path, Path]:
    """Paths of a self-signed certificate for 127.0.0.1, whose common name is `name`, and of its
    key."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    words += ["ec_paramgen_curve:prime256v1", "-days", "30", "-subj", f"/CN={name}"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    words += ["-keyout", str(key), "-out", str(certificate)]
    words += ["-passout", f"pass:{password}"] if password else ["-nodes"]
    subprocess.run(words, check=True, capture_output=True)
    return certificate, key
