"""Takes the pictures of the documentation from a running demo: a task with our polygons, and the dashboard.

`.venv/bin/python -m scripts.screenshots --project <id>` while `make demo` runs; needs Chromium (apt install chromium).
Nothing is submitted. Without `--task`, the task is the one that Label All Tasks serves; it stays locked to that user.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, ViewportSize, sync_playwright

from scripts.demo import EMAIL, PASSWORD

VIEWPORT: ViewportSize = {"width": 1400, "height": 850}
DASHBOARD_WIDTH = 1040

_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM_ARGUMENTS = [
    "--no-sandbox",  # Chromium's sandbox does not start for root, which most containers run as
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE_MS = 60_000


def main() -> None:
    """Save label-studio.png and dashboard.png."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with chromium() as browser:
            _label_studio(browser, options)
            _dashboard(browser, options)
    except Error as error:
        sys.exit(f"No picture: {error.message}\nIs the demo running at these addresses, and is Chromium installed?")


def find_chromium() -> str | None:
    """The system's Chromium, or None."""
    return next(filter(None, map(shutil.which, _CHROMIUM_NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium that talks to nobody but the pages it is sent to."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=_CHROMIUM_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Browser) -> Page:
    """A page without a past, patient enough for Label Studio's start on a busy machine."""
    page = browser.new_page(viewport=VIEWPORT)
    page.set_default_timeout(_PATIENCE_MS)
    return page


def log_in(page: Page, url: str, *, email: str, password: str) -> None:
    """Fill in Label Studio's login form."""
    page.goto(f"{url}/user/login/")
    page.fill("input[name=email]", email)
    page.fill("input[name=password]", password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda address: "/user/login" not in address)


def label_all_tasks(page: Page, url: str, project_id: int) -> None:
    """Press the button. The address it leads to is no substitute: opened by itself, it serves the tab's own order."""
    page.goto(f"{url}/projects/{project_id}/data")
    page.get_by_role("button", name="Label All Tasks").click()
    wait_for_editor(page)


def wait_for_editor(page: Page) -> None:
    """Until the image is drawn and the regions are listed."""
    page.wait_for_selector("canvas")
    page.wait_for_selector("[role=treeitem]")
    page.wait_for_load_state("networkidle")


def select_region(page: Page, index: int) -> str:
    """Select a region in the list; the text that its details show."""
    page.locator("[role=treeitem]").nth(index).click()
    details = page.locator(".lsf-detailed-region")
    details.wait_for()
    return details.inner_text()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--label-studio-url", default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--dashboard-url", default="http://127.0.0.1:9090/ui", help="default: %(default)s")
    parser.add_argument("--project", type=int, required=True, help="the number in the address of the project")
    parser.add_argument("--task", type=int, help="a task to open instead of the one that is served next")
    parser.add_argument("--email", default=EMAIL, help="of the user who signs in; default: %(default)s")
    parser.add_argument("--password", default=PASSWORD, help="that user's; default: that of the demo")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    return parser.parse_args()


def _label_studio(browser: Browser, options: argparse.Namespace) -> None:
    page = new_page(browser)
    log_in(page, options.label_studio_url, email=options.email, password=options.password)
    if options.task is None:
        label_all_tasks(page, options.label_studio_url, options.project)
    else:
        page.goto(f"{options.label_studio_url}/projects/{options.project}/data?task={options.task}")
        wait_for_editor(page)
    select_region(page, 0)
    page.screenshot(path=options.out / "label-studio.png")


def _dashboard(browser: Browser, options: argparse.Namespace) -> None:
    page = new_page(browser)
    page.set_viewport_size({"width": DASHBOARD_WIDTH, "height": 300})
    page.goto(options.dashboard_url)
    page.screenshot(path=options.out / "dashboard.png", full_page=True)


if __name__ == "__main__":
    main()
