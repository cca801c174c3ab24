"""Write deploy/kubernetes/components/monitoring/rules.yaml: the alerts in the form of the Prometheus operator.

python scripts/prometheus_rule.py          # writes it
python scripts/prometheus_rule.py --check  # says whether it is up to date
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
RULE = DEPLOY / "kubernetes" / "components" / "monitoring" / "rules.yaml"

HEAD = """\
# Made from deploy/prometheus/alerts.yml by scripts/prometheus_rule.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: peerturb
spec:
"""


def rule() -> str:
    """Return what the file must hold."""
    return HEAD + indent(ALERTS.read_text(encoding="utf-8"), "  ")


def main(arguments: Sequence[str]) -> int:
    """Write or check; return the exit code."""
    is_current = RULE.is_file() and RULE.read_text(encoding="utf-8") == rule()
    if list(arguments) == ["--check"]:
        print("up to date" if is_current else f"{RULE} is out of date; run python scripts/prometheus_rule.py")
        return 0 if is_current else 1
    RULE.write_text(rule(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
