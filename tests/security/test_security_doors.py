"""Who gets in and what may be seen from outside: advisories about keys, headers, addresses, and shared caches."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from served import Running, Setup, refused, served

from quire.config import ServeOptions
from quire.errors import CapacityError, ConfigError, ValidationError
from quire.serve import auth
from quire.serve.app import create_app
from quire.serve.auth import PUBLIC, KeyCheck, check_bind, read_keys, tenant_name
from quire.serve.errors import clean, failure_of
from quire.serve.listen import check_tls
from quire.serve.service import cache_salt
from waiting import until

LONG = "the same long prompt for everybody, over several pages|"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ServeOptions(enable_prompt_tokens_details=True, allowed_origins=('["https://page.example"]',))
    with served(Setup(options=options, keys=("first", "second"))) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -------------------------------------------------------------------- keys


def test_cve_2026_48746_cve_2026_48710_cve_2026_49468_the_path_is_not_taken_from_the_host_header(
    server: Running,
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as bare:
        for host in ("x/health", "x/health?", "x/health#", "health", "a@b/health", "x/metrics/.."):
            assert bare.get("/v1/models", headers={"Host": host}).status_code in (400, 401)
        assert bare.get("/v1/models", headers={"X-Forwarded-Prefix": "/health"}).status_code == 401


def test_every_route_but_the_public_ones_needs_a_key(server: Running) -> None:
    """Surveys of servers found control routes open although a key was set. CVE-2025-63389 is the same without any."""
    app = create_app(server.service.__class__(server.service.engine, server.service.card, ServeOptions()), ["k"])
    paths = {path for route in app.routes if (path := getattr(route, "path", None))}
    paths |= set(app.openapi()["paths"])
    assert {"/docs", "/openapi.json", "/v1/completions", "/tokenize", "/load"} <= paths
    with httpx.Client(base_url=server.url, timeout=60) as bare:
        for path in paths - PUBLIC:
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                response = bare.request(method, path.replace("{name:path}", "parrot"))
                assert response.status_code == 401 and "API key" in response.text, path


def test_cve_2025_59425_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def digest(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(auth.hmac, "compare_digest", digest)
    check = KeyCheck(lambda *_: None, ["first", "second", "third"])  # type: ignore[arg-type, return-value]
    for given, tenant in ((b"Bearer first", tenant_name("first")), (b"Bearer nobody", None)):
        compared.clear()
        assert check._tenant({"headers": [(b"authorization", given)]}) == tenant
        assert compared == [b"first", b"second", b"third"], "the time tells which key it was"


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "env1,env2")
    assert read_keys(ServeOptions()) == ("env1", "env2")
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfile1\n  file2  \nflag\n")
    file.chmod(0o600)
    options = ServeOptions(api_key=("flag",), api_key_file=str(file))
    assert read_keys(options) == ("flag", "file1", "file2")
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(options)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(ServeOptions(api_key_file=str(tmp_path / "none")))
    for key in ("", "a b", "schlüssel", "a\n"):
        with pytest.raises(ConfigError, match="API key"):
            read_keys(ServeOptions(api_key=(key,)))


def test_a_key_file_that_all_can_read_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("key")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert read_keys(ServeOptions(api_key_file=str(file))) == ("key",)
    assert "chmod 600" in caplog.text


def test_the_header_of_anthropic_clients_counts_too(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as bare:
        assert bare.get("/v1/models", headers={"x-api-key": "second"}).is_success
        assert bare.get("/v1/models", headers={"x-api-key": "third"}).status_code == 401


def test_cve_2025_30202_nothing_listens_to_the_network_without_a_key() -> None:
    with pytest.raises(ConfigError, match="--allow-insecure"):
        check_bind("0.0.0.0", (), allow_insecure=False)


# -------------------------------------------------------------------- what others may learn


def cached(server: Running, key: str, prompt: str, **fields: Any) -> int:
    body = {"prompt": prompt, "max_tokens": 1} | fields
    usage = server.http.post("/v1/completions", json=body, headers=bearer(key)).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_cve_2025_46570_a_cached_prompt_is_found_by_its_own_tenant_only(server: Running) -> None:
    assert cached(server, "first", LONG) == 0
    assert cached(server, "first", LONG) > 0
    assert cached(server, "second", LONG) == 0, "a tenant can tell what another has asked"
    assert cached(server, "second", LONG) > 0
    assert cached(server, "first", LONG, cache_salt="x") == 0
    assert cached(server, "first", LONG, cache_salt="x") > 0
    chat = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}
    for key, found in (("first", False), ("first", True), ("second", False)):
        usage = server.http.post("/v1/chat/completions", json=chat, headers=bearer(key)).json()["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) is found


def test_caches_are_shared_where_the_operator_says_so() -> None:
    options = ServeOptions(enable_prompt_tokens_details=True, share_prefix_cache=True)
    with served(Setup(options=options, keys=("first", "second"))) as server:
        assert cached(server, "first", LONG) == 0
        assert cached(server, "second", LONG) > 0


def test_no_client_can_name_another_tenants_salt() -> None:
    other = tenant_name("other")
    assert cache_salt("mine", f"{other}") == f"mine/{other}"
    assert cache_salt("", None) == "" and cache_salt("", "x") == "x"
    assert "key" not in tenant_name("key")


def test_cve_2026_22778_messages_hold_no_addresses_and_no_paths() -> None:
    for text in (
        "cannot identify <_io.BytesIO object at 0x7fd1c0a3b2f0>",
        "No such file: /srv/models/secret/config.json",
        "in /usr/lib/python3.11/json/decoder.py, line 3",
    ):
        for error in (ValidationError(text, "x"), CapacityError(text), RuntimeError(text)):
            message = failure_of(error).body()["error"]["message"]  # type: ignore[index]
            assert "0x7f" not in message and "/srv" not in message and "/usr" not in message
    for text in ("The model `org/name` does not exist.", "See /v1/models for them.", "either/or, 3/4"):
        assert clean(text) == text


# -------------------------------------------------------------------- headers, pages of others, https


def test_cve_2025_48956_headers_have_a_size() -> None:
    with served(Setup(options=ServeOptions(h11_max_header_count=20))) as server:
        refused(server.http.get("/health", headers=[(f"x-{i}", "y") for i in range(30)]), 431)
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            raw.settimeout(20)
            answered = b""
            with contextlib.suppress(ConnectionError):  # the connection is closed at some point
                for _ in range(500):
                    raw.sendall(b"x-filler: " + b"y" * 8000 + b"\r\n")
                answered = raw.recv(100)
            assert not answered or answered.startswith(b"HTTP/1.1 400"), "headers without end were taken in"
        assert server.http.get("/health", headers={"x": "y" * 30_000}).is_success
        assert server.http.get("/health").is_success


def test_browsers_pages_are_let_in_only_by_name(server: Running) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert (
        server.http.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
    )
    other = server.http.options("/v1/completions", headers=asked | {"Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    with httpx.Client(base_url=server.url, timeout=60) as bare:
        assert bare.post("/v1/completions", headers={"Origin": asked["Origin"]}).status_code == 401
    with served() as plain:
        response = plain.http.options("/v1/completions", headers=asked)
        assert "access-control-allow-origin" not in response.headers
        assert "access-control-allow-origin" not in plain.http.get("/version", headers=asked).headers
        service = plain.service
        service.options = ServeOptions(allowed_origins=("*",), allow_credentials=True)
        with pytest.raises(ConfigError, match="any page"):
            create_app(service)
        service.options = ServeOptions(allowed_origins=("[x",))
        with pytest.raises(ConfigError, match="JSON list"):
            create_app(service)


def certificate(folder: Path) -> tuple[str, str]:
    key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run(
            [*command, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return key, cert


def test_https(tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    options = ServeOptions(ssl_keyfile=key, ssl_certfile=cert)
    check_tls(options)
    with served() as plain:
        config = uvicorn.Config(create_app(plain.service), port=0, ssl_keyfile=key, ssl_certfile=cert, lifespan="off")
        config.log_level = "error"
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        trusted = ssl.create_default_context(cafile=cert)
        assert httpx.get(f"https://127.0.0.1:{port}/version", verify=trusted, timeout=60).is_success
        server.should_exit = True
        thread.join()


def test_https_options_are_checked_early(tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    for options, message in (
        (ServeOptions(ssl_keyfile=key), "need --ssl-certfile"),
        (ServeOptions(ssl_certfile=str(tmp_path / "none")), "cannot be used"),
        (ServeOptions(ssl_certfile=cert, ssl_keyfile=cert), "cannot be used"),
        (ServeOptions(ssl_certfile=cert, ssl_keyfile=key, ssl_cert_reqs=7), "ssl-cert-reqs"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tls(options)
