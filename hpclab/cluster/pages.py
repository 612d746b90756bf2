"""The web pages of a local cluster: what takes long to import comes when somebody asks for one of them."""

import importlib.util
from typing import Any

import dask
from distributed import Scheduler
from distributed.http.routing import RoutingApplication
from distributed.http.utils import get_handlers

ROUTES = "distributed.scheduler.http.routes"
SLOW = ("distributed.http.proxy",)
"""Routes that import aiohttp and all of jupyter-server-proxy: the way to the workers' own pages."""


class Pages(RoutingApplication):
    """Has a scheduler start without its dashboard, and adds that once a path is asked for that nothing else serves.

    Its imports, most of them bokeh's, take as long as those of Dask itself, and most clusters end unwatched.

    Attributes
    ----------
    config : dict
        Of Dask, while the scheduler starts.
    options : dict
        Of the scheduler; where bokeh is missing, Dask's page that says so is there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        routes = dask.config.get(ROUTES)
        self.config = {ROUTES: [route for route in routes if route not in SLOW]}
        self.later = [route for route in routes if route in SLOW]
        self.bokeh = importlib.util.find_spec("bokeh") is not None
        self.options = {"dashboard": not self.bokeh}

    def serve(self, scheduler: Scheduler) -> None:
        """Wait for the first request."""
        self.scheduler = scheduler
        scheduler.http_application.add_application(self)

    def find_handler(self, request: Any, **kwargs: Any) -> Any:
        """Add all pages, and find the one that was asked for among them; called by tornado in the scheduler's loop."""
        application = self.scheduler.http_application
        application.applications.remove(self)
        application.add_handlers(".*$", get_handlers(self.scheduler, self.later))
        if self.bokeh:
            from distributed.dashboard.scheduler import connect

            connect(application, self.scheduler.http_server, self.scheduler)
        return application.find_handler(request, **kwargs)
