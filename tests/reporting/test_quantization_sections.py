import pytest

from dmq_jax import denoisers, exporting
from dmq_jax.config import ReportConfig
from dmq_jax.reporting import quantization_sections, results
from tests import tiny
from tests.reporting import finished_run


def test_a_layer_without_scales_cannot_be_plotted(tmp_path):
    finished_run.write(tmp_path)
    found = results.read(tmp_path)
    with pytest.raises(ValueError, match="report.layers has 'nowhere'"):
        quantization_sections.scales_section(found, ReportConfig(layers=('nowhere',)))


def test_an_export_alone_tells_which_layers_could_have_been_quantized():
    exported = exporting.Exported(
        tiny.NETWORK, tiny.INFO, {}, 'nearest', finished_run.TIMESTEPS, {}, {}, {}
    )
    found = quantization_sections.quantizable_layers(exported)
    assert found == denoisers.quantizable(tiny.teacher())
