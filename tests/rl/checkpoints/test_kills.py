"""kill -9 at random moments; benchmarks/reliability.py does it 200 times."""

from tests.rl.checkpoints.killing import kill_often


def test_killed_processes_leave_whole_checkpoints_and_the_run_goes_on_with_the_same_bits(tmp_path):
    result = kill_often(tmp_path, 10)
    assert (result.damaged, result.same_as_uninterrupted) == (0, True)
    assert result.last > 0
