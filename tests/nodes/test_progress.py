"""What the node of a long task shows while it works."""


def test_a_long_task_shows_what_is_done_and_the_time_left_and_can_be_cancelled(found):
    shown, bars, cancelled = found("progress")
    assert shown[:4] == ["30 of 40 images", "31 of 40 images, 18 s left", "33 of 40 images, 9 s left", "40 of 40 images"]
    assert shown[-2:] == ["0 of 4 images", "2 of 4 images, 1 s left"]
    assert shown[4] == "measuring" and bars == [[30, 40], [31, 40], [33, 40], [40, 40], [41, 40]]
    assert cancelled
