"""`lavin-rt serve` as a process: its end, two behind a proxy, many clients, and whatever its description allows."""

# ruff: noqa: E402 (what needs an extra comes behind the question whether it is there)
from __future__ import annotations

import io
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the extra test")

from PIL import Image
from serving import message, picture, pixels, running, wait_until

from lavin_rt.pipeline import Pipeline
from lavin_rt.serve.limits import Limits
from lavin_rt.serve.service import Service

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def process(*arguments: str):
    """A service of its own, its process and address; ended with the block."""
    command = [sys.executable, "-m", "lavin_rt.cli", "serve", "--port", "0", "--no-page", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        try:
            line = service.stdout.readline()
            assert "http://" in line, service.stderr.read()
            yield service, re.search(r"http://\S+", line)[0]
        finally:
            if service.poll() is None:
                service.kill()


def test_term_finishes_what_runs_and_answers_everybody():
    with process("--batch-size", "1", "--grace", "60") as (service, address):
        codes: list[int] = []

        def ask() -> None:
            files, data = {"query": picture()}, {"steps": "60"}
            codes.append(httpx.post(f"{address}/v1/tasks/negative/run", files=files, data=data, timeout=60).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        figures = lambda: httpx.get(f"{address}/metrics").text  # noqa: E731
        wait_until(lambda: "queue_length 3.0" in figures() and "lavin_rt_running 1.0" in figures(), 30)
        service.send_signal(signal.SIGTERM)
        wait_until(lambda: len(codes) == 3)
        assert codes == [503] * 3
        late = httpx.get(f"{address}/ready")
        assert late.status_code == 503 and "ask another" in message(late) and "retry-after" in late.headers
        for thread in threads:
            thread.join(60)
        assert codes == [503] * 3 + [200]
        assert service.wait(20) == 0 and "Traceback" not in service.stderr.read()


def test_term_ends_what_outlasts_the_grace():
    with process("--grace", "0.2") as (service, address):
        answers = []
        data = {"steps": "100"}
        ask = lambda: answers.append(  # noqa: E731
            httpx.post(f"{address}/v1/tasks/negative/run", files={"query": picture()}, data=data, timeout=60)
        )
        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: "lavin_rt_running 1.0" in httpx.get(f"{address}/metrics").text, 30)
        service.send_signal(signal.SIGTERM)
        thread.join(60)
        assert answers[0].status_code == 503 and "shutting down" in message(answers[0])
        assert service.wait(20) == 0


NGINX_CONF = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream lavin {{ least_conn; {servers} }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 64m;
    location / {{
      proxy_pass http://lavin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 600s; proxy_next_upstream error timeout http_503 non_idempotent; proxy_next_upstream_tries 2;
    }}
  }}
}}
"""


@pytest.mark.skipif(NGINX is None, reason="needs nginx (apt-get install nginx-light)")
def test_two_behind_nginx(tmp_path):
    from lavin_rt.serve.server import listen

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    (tmp_path / "token").write_text("a-token-of-some-length")
    options = ("--token-file", str(tmp_path / "token"))
    header = {"Authorization": "Bearer a-token-of-some-length"}
    with process(*options) as (one, first), process(*options) as (other, second):
        servers = " ".join(f"server {address.removeprefix('http://')};" for address in (first, second))
        conf = tmp_path / "nginx.conf"
        conf.write_text(NGINX_CONF.format(folder=tmp_path, port=port, servers=servers))
        with subprocess.Popen([NGINX, "-c", str(conf), "-e", str(tmp_path / "error.log")]) as proxy:
            try:
                address = f"http://127.0.0.1:{port}"
                wait_until(lambda: works(f"{address}/health"), 20)

                def ask(i: int):
                    return httpx.post(
                        f"{address}/v1/tasks/negative/run",
                        files={"query": picture(i)},
                        data={"steps": "4", "seed": str(i)},
                        headers=header,
                        timeout=60,
                    )

                with ThreadPoolExecutor(8) as pool:
                    assert {answer.status_code for answer in pool.map(ask, range(16))} == {200}
                for service in (first, second):
                    figures = httpx.get(f"{service}/metrics", headers=header).text
                    assert float(re.search(r"lavin_rt_batch_requests_sum (\S+)", figures)[1]) > 0
                one.send_signal(signal.SIGTERM)  # while it drains and when it is gone, the other answers
                with ThreadPoolExecutor(4) as pool:
                    assert {answer.status_code for answer in pool.map(ask, range(8))} == {200}
                assert one.wait(20) == 0 and other.poll() is None
            finally:
                proxy.terminate()


def works(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


TASKS = ("depth_estimation", "negative", "edge_detection", "normal_estimation")


def test_many_clients_each_with_the_right_answer():
    pipe = Pipeline.from_pretrained(device="cpu", dtype="float32")
    rng = random.Random(0)
    asked = [
        {"task": rng.choice(TASKS), "seed": rng.randrange(1000), "steps": rng.choice((4, 6)), "query": i}
        for i in range(32)
    ]
    right = {}
    for i, one in enumerate(asked):
        image = Image.open(io.BytesIO(picture(one["query"])))
        right[i] = pixels_of(pipe.task(one["task"])(image, steps=one["steps"], seed=one["seed"]))
    service = Service(pipe, Limits())
    with running(service) as address, httpx.Client(base_url=address, timeout=120) as client:

        def ask(i: int):
            one = asked[i]
            data = {"seed": str(one["seed"]), "steps": str(one["steps"])}
            return client.post(f"/v1/tasks/{one['task']}/run", files={"query": picture(one["query"])}, data=data)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(len(asked))))
        assert {answer.status_code for answer in answers} == {200}
        for i, answer in enumerate(answers):
            assert abs(pixels(answer.content) - right[i]).max() <= 2
        figures = client.get("/metrics").text
        assert sum(map(float, re.findall(r"lavin_rt_answers_total{\S+} (\S+)", figures))) == len(asked)
        assert max(int(answer.headers["lavin-batch"]) for answer in answers) > 1


def pixels_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return pixels(file.getvalue())


def test_nothing_that_the_description_allows_is_a_5xx():
    schemathesis = pytest.importorskip("schemathesis", reason="needs the extra test")
    from hypothesis import HealthCheck, Phase, settings

    service = Service(Pipeline.from_pretrained(device="cpu", dtype="float32"), Limits(tasks=4, steps=6))
    with running(service) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        began, seen = time.monotonic(), 0
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(
                max_examples=12,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @schemathesis_given(operation)
            def attempt(case):
                nonlocal seen
                seen += 1
                response = case.call(base_url=address, timeout=30)
                assert response.status_code < 500, (case, response.text)

            attempt()
        assert seen > 60 and time.monotonic() - began < 200
        assert httpx.get(f"{address}/ready").status_code == 200


def schemathesis_given(operation):
    from hypothesis import given

    return given(case=operation.as_strategy())
