"""Prometheus, its alerts and the Grafana dashboard: over metrics that the workers really export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.training.context import RAY_METRICS
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "infra" / "monitoring"
EXPORTED = {f"ray_{name}" for name, _ in RAY_METRICS.values()}  # as Ray shows them to Prometheus
LABELS = {"run", "rank"}


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dashboards" / "metapipe.json").read_text())


def expressions() -> list[str]:
    variables = [variable["query"]["query"] for variable in dashboard()["templating"]["list"]]
    return variables + [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_shows_every_metric_of_ours_and_no_other() -> None:
    assert len(EXPORTED) == 6
    assert set().union(*map(metrics_in, expressions())) == EXPORTED
    assert all(metrics_in(expression) for expression in expressions())


def test_alerts_are_over_our_metrics() -> None:
    named = set().union(*(metrics_in(rule["expr"]) for rule in alerts()))
    assert named
    assert named <= EXPORTED
    assert all(rule["annotations"]["summary"] for rule in alerts())


def test_queries_use_the_labels_that_there_are() -> None:
    for expression in [*expressions(), *(rule["expr"] for rule in alerts())]:
        for inside in re.findall(r"\bby \(([^)]*)\)", expression) + re.findall(r"\{([^}]*)\}", expression):
            labels = {part.strip() for part in re.split(r"=~?\"[^\"]*\"|,", inside) if part.strip()}
            assert labels <= LABELS | {"job"}, expression
        assert expression.count("(") == expression.count(")")


def test_panels_have_their_own_place_and_a_title() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(columns) < 24
        taken |= cells
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "s", "percentunit")
        assert all(target["refId"] for target in panel["targets"])


def test_one_data_source_from_provisioning_to_panels() -> None:
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in dashboard()["panels"]}
    assert used == {source["uid"]}
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "metapipe.yaml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in compose["grafana"]["volumes"])


def test_prometheus_asks_rays_service_discovery_with_the_token() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"] == "http://ray-head:8265/api/prometheus/sd"
    assert discovery["authorization"]["type"] == "Bearer"
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert discovery["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret] == {"environment": "RAY_AUTH_TOKEN"}
    import ray.dashboard.modules.reporter.reporter_head as reporter

    assert "/api/prometheus/sd" in Path(reporter.__file__).read_text()
