"""A real browser on a real JupyterLab with a real kernel: for the browser tests, the latency bench and the screenshot."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every output is in the page
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/filebrowser-extension:browser": {"navigateToCurrentDirectory": False},
}
AT_ONCE = "--ServerApp.jpserver_extensions=sparselab.server=True"  # as `make lab` does
BENIGN = ("favicon", "ResizeObserver loop")  # what the browser and JupyterLab say by themselves


@contextmanager
def server(root: Path, scratch: Path, at_once: bool = True) -> Iterator[str]:
    """JupyterLab on the notebooks below `root`, by default as `make lab` starts it; everything that it writes of its own goes to `scratch`."""
    (scratch / "config" / "labconfig").mkdir(parents=True, exist_ok=True)
    (scratch / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTERLAB_SETTINGS_DIR": "settings", "IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(scratch / folder) for name, folder in places.items()}
    environment |= {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}",
               "--LabApp.expose_app_in_browser=True", *[AT_ONCE] * at_once]
    with open(scratch / "lab.log", "w") as log:
        lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/api"), 60, lambda: (scratch / "lab.log").read_text()[-2000:])
        yield url
    finally:
        ended(lab)  # the server ends its kernels


def ended(process: subprocess.Popen, seconds: float = 30) -> None:
    """Ask `process` to end, and kill it after `seconds`: a server that hangs while it closes is no fault of what was tested."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def until(true, seconds: float = 30, otherwise=lambda: "it did not happen"):
    """Wait for `true()` and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {otherwise()}"
        time.sleep(0.05)
    return found


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def browser() -> Iterator:
    """Debian's chromium, headless, driven by playwright."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium, headless=True, args=[
            "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        try:
            yield chrome
        finally:
            chrome.close()


class Notebook:
    """A notebook open in JupyterLab: `page` is playwright's, `errors` is what the browser's console complained about."""

    def __init__(self, chrome, url: str, path: str, scratch: Path, size: tuple[int, int] = (1400, 1000),
                 script: str = ""):
        self.url, self.scratch, self.errors, self.heard = url, scratch, [], []
        self.page = chrome.new_page(viewport={"width": size[0], "height": size[1]})
        self.page.add_init_script(script)  # runs before all others
        self.page.on("console", lambda message: self._heard(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self._heard(str(error)))
        self.page.goto(f"{url}/lab/tree/{path}?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        ready = "async () => (await jupyterapp.shell.currentWidget?.sessionContext.ready, " \
                "jupyterapp.shell.currentWidget?.sessionContext.session?.kernel?.status === 'idle')"
        until(lambda: self.page.evaluate(ready), 90)
        self.connect()

    def _heard(self, text: str) -> None:
        if not any(words in text for words in BENIGN):
            self.errors.append(text)

    @property
    def kernel_id(self) -> str:
        return self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")

    def connect(self) -> None:
        """A second client of the notebook's kernel, to look at its variables."""
        from jupyter_client import BlockingKernelClient

        self.kernel = BlockingKernelClient()
        self.kernel.load_connection_file(str(self.scratch / "runtime" / f"kernel-{self.kernel_id}.json"))
        self.kernel.start_channels()
        self.kernel.wait_for_ready(60)

    def run_all(self, seconds: float = 120) -> None:
        """Run All, and wait until every cell has ended."""
        self.page.evaluate("() => { window.ran = ''; jupyterapp.commands.execute('notebook:run-all-cells')"
                           ".then(() => { window.ran = 'to the end'; }, error => { window.ran = String(error); }); }")
        assert until(lambda: self.page.evaluate("() => window.ran"), seconds) == "to the end"

    def value(self, expression: str, seconds: float = 30):
        """The value of a Python expression in the notebook's kernel, by way of JSON."""
        wrapped = {"value": f"__import__('json').dumps({expression})"}
        found = self._asked(seconds, code="", silent=True, user_expressions=wrapped)["user_expressions"]["value"]
        assert found["status"] == "ok", f"{expression}: {found}"
        return json.loads(eval(found["data"]["text/plain"]))

    def do(self, code: str, seconds: float = 60) -> None:
        """Run Python in the notebook's kernel."""
        content = self._asked(seconds, code=code)
        assert content["status"] == "ok", content

    def _asked(self, seconds: float, **request) -> dict:
        """What the kernel answers to a request; what others have made it say meanwhile is kept for `tracebacks`."""
        sent, end = self.kernel.execute(**request, allow_stdin=False), time.monotonic() + seconds
        while True:
            reply = self.kernel.get_shell_msg(timeout=max(0, end - time.monotonic()))
            self._listen()
            if reply["parent_header"].get("msg_id") == sent:
                return reply["content"]

    def _listen(self) -> None:
        while self.kernel.iopub_channel.msg_ready():
            message = self.kernel.get_iopub_msg(timeout=1)
            if message["msg_type"] == "error" or message["content"].get("name") == "stderr":
                self.heard.append(json.dumps(message["content"]))

    def restart(self) -> None:
        """Restart the kernel, as the button does, and wait until the page has noticed."""
        self.kernel.stop_channels()
        self.page.evaluate("async () => { const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;"
                           " await kernel.restart(); await kernel.requestKernelInfo(); }")
        self.connect()

    def tracebacks(self) -> list[str]:
        """What cells and callbacks have written to stderr, or raised."""
        shown = '.jp-OutputArea [data-mime-type$="stderr"], .jp-OutputArea [data-mime-type$="error"]'
        self._listen()
        found = self.page.locator(shown).all_text_contents() + self.heard
        return [text for text in found if "TCP without encryption" not in text]
