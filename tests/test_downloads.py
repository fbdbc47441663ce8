"""Downloads from a small copy of Hugging Face on 127.0.0.1, which cuts connections, refuses, and serves wrong files."""

import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import open_clip
import pytest
from huggingface_hub import constants

import rewards.clip
from rewards import aesthetic
from textcraftor import downloads
from textcraftor.errors import UserError

ROOT = Path(__file__).parents[1]
LARGE = random.Random(0).randbytes(25 << 20)  # the library writes 10 MiB at a time
HPS = "xswu/HPSv2/HPS_v2_compressed.pt"


class Hub:
    """What the server answers to huggingface_hub, from `contents` {"owner/name/path": bytes}.

    cuts: {path: [what happens to each GET]}: the number of bytes after which it is cut, "reset" (a TCP reset after
    12 MiB) or "500" (only that status); status: {repo: HTTP status}; promised: {path: sha256 that the server reports}.
    Contents come from another host name, as with the real one. `gets` are the (path, first byte, authorization) of all
    GETs there, `tokens` the authorizations sent to the server itself.
    """

    def __init__(self, contents):
        self.contents, self.cuts, self.status, self.promised, self.gets = contents, {}, {}, {}, []
        self.tokens = set()

    def sha256(self, path):
        return self.promised.get(path) or hashlib.sha256(self.contents[path]).hexdigest()

    def info(self, repo, name):
        content = self.contents[f"{repo}/{name}"]
        info = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        lfs = {"oid": self.sha256(f"{repo}/{name}"), "size": len(content), "pointerSize": 130}
        return info if name.endswith((".json", ".txt")) else info | {"lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        hub = self.server.hub
        repo = self.path.split("/api/")[1].split("/", 1)[1].removesuffix("/paths-info/main")
        names = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        if repo in hub.status:
            return self.answer(hub.status[repo], {})
        infos = [hub.info(repo, name) for name in names if f"{repo}/{name}" in hub.contents]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(infos).encode())

    def do_GET(self, head=False):
        hub, path = self.server.hub, unquote(self.path[1:]).replace("/resolve/main/", "/").removeprefix("datasets/")
        if not head and not path.startswith("cdn/") and path in hub.contents:
            hub.tokens.add(self.headers.get("Authorization"))
            return self.answer(302, {"Location": f"http://localhost:{self.server.server_port}/cdn/{quote(path)}"})
        path = path.removeprefix("cdn/")
        if path not in hub.contents:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        content, first = hub.contents[path], 0
        headers = {"ETag": f'"{hub.sha256(path)}"', "X-Repo-Commit": "1" * 40}
        if head:
            return self.answer(200, headers | {"Content-Length": len(content)})
        if "Range" in self.headers:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        hub.gets.append((path, first, self.headers.get("Authorization")))
        body = content[first:]
        headers["Content-Length"] = len(body)
        if cuts := hub.cuts.get(path):
            cut = cuts.pop(0)
            if cut == "500":
                return self.answer(500, {})
            if cut == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            body, self.close_connection = body[: 12 << 20 if cut == "reset" else cut], True
        self.answer(206 if first else 200, headers, body)
        if self.close_connection:
            self.wfile.flush()
            self.connection.close()

    def do_HEAD(self):
        self.do_GET(head=True)


@pytest.fixture
def hub():
    """A server with every file that can be downloaded, small ones except for HPS v2."""
    paths = [
        f"{source.repo}/{name}"
        for sources in downloads.SOURCES.values()
        for source in sources
        for name in source.files
        if source.kind != "url"
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub({path: path.encode() for path in paths} | {HPS: LARGE})
    server.hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(hub, root, only, **environment):
    """download_models.py as a user runs it; returns (exit status, output, errors)."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    done = subprocess.run(
        [sys.executable, ROOT / "download_models.py", "--root", root, "--only", only],
        env=unset | {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "hf" not in path.parts)


def test_each_file_goes_to_its_place_once(hub, tmp_path):
    status, output, errors = fetch(hub, tmp_path, "sd,prompts,pickscore,hpsv2.1")
    assert status == 0, errors
    expected = [f"stable-diffusion-v1-5/{name}" for name in downloads.STABLE_DIFFUSION_FILES]
    expected += ["openprompts.csv", "pickscore/pickmodel/config.json", "pickscore/pickmodel/model.safetensors"]
    assert files(tmp_path) == sorted([*expected, "hpsv2/HPS_v2.1_compressed.pt"])
    unet = tmp_path / "stable-diffusion-v1-5" / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.read_text() == f"{downloads.SOURCES['sd'][0].repo}/unet/diffusion_pytorch_model.safetensors"
    assert "GB to download" in output and "GB free in" in output

    hub.gets.clear()
    assert fetch(hub, tmp_path, "sd,prompts,pickscore,hpsv2.1")[:2] == (0, "all files are in place\n")
    assert hub.gets == []
    unet.write_text("broken")  # of another size than the hub's
    assert fetch(hub, tmp_path, "sd")[0] == 0
    assert [path for path, _, _ in hub.gets] == [unet.read_text()]
    # The hub is not asked when the user says so.
    assert fetch(hub, tmp_path, "sd", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")[:2] == (
        0,
        "all files are in place\n",
    )
    status, _, errors = fetch(hub, tmp_path, "hpsv2", HF_HUB_OFFLINE="1")
    assert status == 1 and "HPS_v2_compressed.pt is missing and HF_HUB_OFFLINE is set" in errors


def test_towers_go_to_the_hubs_cache_where_the_rewards_look(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    repo = downloads.SOURCES["clip"][0].repo
    with pytest.raises(UserError, match="download_models.py --only clip"):
        rewards.check_files(["clip"], tmp_path)
    safe, pickled = (f"{repo}/{name}" for name in downloads.TOWER_FILES)
    del hub.contents[safe]  # then the other one is taken
    assert fetch(hub, tmp_path, "clip")[0] == 0
    rewards.check_files(["clip"], tmp_path)
    hub.contents[safe] = hub.contents[pickled]
    hub.gets.clear()
    assert fetch(hub, tmp_path, "clip")[0] == 0
    assert [path for path, _, _ in hub.gets] == [safe]
    assert fetch(hub, tmp_path, "clip", HF_HUB_OFFLINE="1")[0] == 0


def test_sources_are_the_rewards_own():
    for name, tower in (("clip", rewards.clip.TOWER), ("aesthetic", aesthetic.TOWER)):
        assert open_clip.get_pretrained_cfg(*tower)["hf_hub"].rstrip("/") == downloads.SOURCES[name][-1].repo
    assert downloads.HEAD.files == (aesthetic.HEAD,)
    assert set(rewards.REWARDS) < set(downloads.SOURCES)


def test_a_cut_download_continues_where_it_stopped(hub, tmp_path):
    hub.cuts[HPS] = [12 << 20, "reset"]
    status, _, errors = fetch(hub, tmp_path, "hpsv2", HF_TOKEN="hf_secret")
    assert status == 0, errors
    begun, cut, reset = (first for _, first, _ in hub.gets)
    # The token goes to Hugging Face alone, not to the host of the contents.
    assert hub.tokens == {"Bearer hf_secret"} and {token for *_, token in hub.gets} == {None}
    assert begun == 0 and cut == 10 << 20 and reset in (10 << 20, 20 << 20)  # a reset may lose what was on its way
    assert (tmp_path / "hpsv2" / "HPS_v2_compressed.pt").read_bytes() == LARGE
    assert files(tmp_path) == ["hpsv2/HPS_v2_compressed.pt"]


def test_a_failed_download_is_no_file_and_the_next_run_continues_it(hub, tmp_path):
    hub.cuts[HPS] = [12 << 20, *["500"] * 9]
    status, _, errors = fetch(hub, tmp_path, "hpsv2,hpsv2.1")
    assert status == 1 and "error: downloads that failed: 1" in errors
    assert "xswu/HPSv2: " in errors and "the same command continues the download" in errors
    assert files(tmp_path) == ["hpsv2/HPS_v2.1_compressed.pt", "hpsv2/HPS_v2_compressed.pt.part"]
    hub.cuts.clear()
    hub.gets.clear()
    assert fetch(hub, tmp_path, "hpsv2")[0] == 0
    assert [first for _, first, _ in hub.gets] == [10 << 20]
    assert (tmp_path / "hpsv2" / "HPS_v2_compressed.pt").read_bytes() == LARGE


def test_a_wrong_hash_leaves_nothing_behind(hub, tmp_path):
    paths = ["xswu/HPSv2/HPS_v2.1_compressed.pt", f"{downloads.SOURCES['clip'][0].repo}/{downloads.TOWER_FILES[0]}"]
    hub.promised = dict.fromkeys(paths, "f" * 64)
    status, _, errors = fetch(hub, tmp_path, "hpsv2.1,clip")
    assert status == 1
    for path in paths:
        assert f"expected {len(path)} bytes with sha256 {'f' * 64}; the file was removed" in errors
        assert [file for file in tmp_path.rglob("*") if file.is_file() and path.split("/")[-1] in file.name] == []
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("blobs/*"))
    hub.promised.clear()
    assert fetch(hub, tmp_path, "hpsv2.1,clip")[0] == 0


def test_refusals_are_explained_and_the_rest_is_fetched(hub, tmp_path):
    hub.status = {"xswu/HPSv2": 401, "krea-ai/open-prompts": 404}
    del hub.contents["yuvalkirstain/PickScore_v1/model.safetensors"]
    status, _, errors = fetch(hub, tmp_path, "hpsv2,prompts,pickscore,sd")
    assert status == 1 and "error: downloads that failed: 3" in errors
    assert "xswu/HPSv2: access refused (401); log in with `hf auth login` or set HF_TOKEN" in errors
    assert f"krea-ai/open-prompts: not found (404) on {hub.url}" in errors
    assert "yuvalkirstain/PickScore_v1: the repository has no file model.safetensors" in errors
    assert files(tmp_path) == sorted(f"stable-diffusion-v1-5/{name}" for name in downloads.STABLE_DIFFUSION_FILES)


def test_what_another_attempt_cannot_mend_is_not_tried_again(hub, tmp_path):
    status, _, errors = fetch(hub, tmp_path, "hpsv2,beauty")
    assert status == 1 and errors.startswith("error: --only hpsv2,beauty: 'beauty' is not known; choose from sd, ")
    (tmp_path / "hpsv2").write_text("")  # a file where a folder belongs
    status, _, errors = fetch(hub, tmp_path, "hpsv2.1")
    assert status == 1 and "cannot be written: File exists" in errors and "same command" not in errors
    status, _, errors = fetch(hub, tmp_path / "hpsv2", "hpsv2.1", HF_HOME=str(tmp_path))
    assert status == 1 and "hpsv2: is a file, expected a folder" in errors
    assert files(tmp_path) == ["hpsv2"] and hub.gets == []


def test_the_aesthetic_head_comes_from_its_own_address(hub, tmp_path, monkeypatch):
    content = hub.contents["head.pth"] = LARGE[: 15 << 20]
    source = downloads.HEAD._replace(repo=f"{hub.url}/head.pth")
    monkeypatch.setitem(downloads.SOURCES, "aesthetic", [source])
    monkeypatch.setattr(downloads, "HEAD_SIZE", len(content))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match="was removed. Run the same command again.*get it from elsewhere"
    ):  # its sha256 is known beforehand
        downloads.download(["aesthetic"], tmp_path)
    assert files(tmp_path) == []
    monkeypatch.setattr(downloads, "HEAD_SHA256", hashlib.sha256(content).hexdigest())
    hub.cuts["head.pth"] = [12 << 20]
    downloads.download(["aesthetic"], tmp_path)
    assert files(tmp_path) == [f"aesthetic/{aesthetic.HEAD}"]
    assert [first for _, first, _ in hub.gets] == [0, 0, 10 << 20]


def test_a_full_disk_is_reported_before_anything_is_downloaded(tmp_path, monkeypatch):
    source = downloads.HEAD
    file = downloads.File(source, source.files[0], 1000, None)
    part = downloads.part_of(downloads.place_of(file, tmp_path))
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(900))
    monkeypatch.setattr(downloads, "free_bytes", lambda folder: 100)
    said = []
    downloads.check_disk([file], tmp_path, said.append)
    assert said == [f"0.00 GB to download, 0.00 GB free in {tmp_path}"]
    part.write_bytes(bytes(899))
    with pytest.raises(UserError, match="free some space"):
        downloads.check_disk([file], tmp_path, said.append)
