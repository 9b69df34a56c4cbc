"""The artefacts of a run -> one self-contained `report.html`.

Reads what the other stages wrote and nothing else; what is not there yet is left out, and the page
says which stage makes it.
"""

from pathlib import Path

from dmq_jax.config import ReportConfig
from dmq_jax.reporting import markup, results
from dmq_jax.reporting import outcome_sections as outcome
from dmq_jax.reporting import quantization_sections as quantization
from dmq_jax.runtime import hosts, log


def run(workdir: Path, config: ReportConfig) -> None:
    """Writes `report.html` into `workdir` from what the other stages left there; process 0 alone.

    Args:
      workdir: of the run.
      config: size of the grids, layers whose scales are shown.

    Raises:
      ValueError: `config.layers` names a layer without quantized inputs.
    """
    if not hosts.is_first():
        return
    found = results.read(workdir)
    sections = [
        ('Images', outcome.images_section(found, config)),
        ('Results', outcome.results_section(found)),
        ('Learning', outcome.learning_section(found)),
        ('Scales over time', quantization.scales_section(found, config)),
        ('Error over time', quantization.error_section(found)),
        ('Sensitive layers', quantization.sensitivity_section(found)),
        ('Error of the kernels', quantization.kernel_section(found)),
        ('What is quantized', quantization.plan_section(found)),
        ('How this was made', outcome.provenance_section(found)),
    ]
    body = outcome.header(found) + ''.join(
        f'<section><h2>{title}</h2>{content}</section>' for title, content in sections
    )
    # Replaced as a whole: whoever has the page open never reloads half of it.
    log.write_text(workdir / 'report.html', markup.document(outcome.page_title(found), body))
