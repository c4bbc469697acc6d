import pytest

from compress.forecast import PRODUCTS, forecast, measure_rate
from compress.options import METHODS, CompressOptions
from compress.source import Source
from tests.compress.models import save_tiny

RATE = 1e9


def small(**options):
    return CompressOptions(calibration_tokens=512, sequence_length=32, **options)


@pytest.fixture
def of_blocks(tmp_path):
    return lambda n: Source.open(save_tiny(tmp_path / f"{n}", "llama", num_hidden_layers=n))


def test_every_method_has_a_cost():
    assert PRODUCTS.keys() == METHODS.keys()


def test_time_grows_with_the_blocks_and_memory_does_not(of_blocks):
    few, many = (forecast(of_blocks(n), small(), RATE) for n in (2, 8))
    assert 3 < many.seconds / few.seconds <= 4  # the head is there once
    assert many.memory == few.memory


def test_what_costs_time_is_predicted_to(of_blocks):
    source = of_blocks(2)
    plain = forecast(source, small(refinement=0, allocation="uniform", method="wanda"), RATE).seconds
    more = [
        small(refinement=1, allocation="uniform", method="wanda"),
        small(refinement=0, method="wanda"),
        small(refinement=0, allocation="uniform", method="alps"),
        CompressOptions(
            calibration_tokens=1024, sequence_length=32, refinement=0, allocation="uniform", method="wanda"
        ),
    ]
    assert all(forecast(source, options, RATE).seconds > plain for options in more)
    assert forecast(source, small(), RATE / 2).seconds == 2 * forecast(source, small(), RATE).seconds


def test_refinement_needs_room_for_moments_where_blocks_are_large(tmp_path):
    size = {"hidden_size": 384, "intermediate_size": 768}
    source = Source.open(save_tiny(tmp_path / "large", "llama", **size))
    assert forecast(source, small(), RATE).memory > forecast(source, small(refinement=0), RATE).memory


def test_tuning_holds_the_whole_model(of_blocks):
    few, many = of_blocks(20), of_blocks(40)
    tuned = [forecast(source, small(tuning_minutes=1), RATE).memory for source in (few, many)]
    assert forecast(few, small(), RATE).memory < tuned[0] < tuned[1]
    assert forecast(many, small(tuning_minutes=1, tuning_of="factors"), RATE).memory < tuned[1]


def test_the_rate_is_that_of_a_computer():
    assert 1e9 < measure_rate() < 1e14
