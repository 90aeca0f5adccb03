"""The composer: prompt, timeline, parts, shape and recipe, as a person sets them, and as the API is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.client_server import PROMPT, ServerProcess, create_video, make_video, png, wait_until_finished
from tests.server.page.browser import Tab
from tests.server.page.conftest import OpenTab
from tests.server.page.test_making import submit, wait_for_video

PHOTO = png("orange", (96, 160))


def asked(tab: Tab) -> dict[str, Any]:
    """Makes what is in the composer, and returns the body that the page sent."""
    with tab.page.expect_request(
        lambda request: request.method == "POST" and request.url.endswith("/v1/videos")
    ) as sent:
        tab.page.locator("#make").click()
    body: dict[str, Any] = json.loads(sent.value.post_data or "")
    return body


def open_newest(tab: Tab) -> None:
    """Puts the newest video of the gallery on the stage."""
    tile = tab.page.locator(".tile").first
    tile.locator("button").click()
    expect(tab.page.locator("#stage")).to_have_attribute("data-video", tile.get_attribute("data-key") or "")


def item(tab: Tab, number: int = 0) -> Any:
    """Returns an image or clip of the timeline."""
    return tab.page.locator(".item").nth(number)


def test_plan_follows_what_is_typed(tab: Tab) -> None:
    plan = tab.page.locator("#plan")
    tab.type_prompt(PROMPT)
    expect(plan).to_contain_text("128x128, 1.04 s")
    tab.set_length(49)
    expect(plan).to_contain_text("2.04 s")
    tab.page.get_by_label("Shape", exact=True).select_option("16:9")
    expect(plan).to_contain_text("160x96")


def test_what_does_not_fit_is_corrected_by_a_button(tab: Tab) -> None:
    tab.type_prompt(PROMPT)
    tab.page.get_by_label("Shape", exact=True).select_option("own")
    tab.page.get_by_label("Width x height").fill("8192x8192")
    tab.page.get_by_text("More:").click()
    tab.page.get_by_label("Sample window by window", exact=True).select_option("false")
    tab.set_length(257)
    plan = tab.page.locator("#plan")
    expect(plan).to_have_class("plan bad")
    tab.page.get_by_role("button", name="Use what fits").click()
    expect(plan).to_have_class("plan")
    expect(plan).to_contain_text("of memory")


def test_prompt_shows_tokens_unknown_words_and_what_is_cut(tab: Tab) -> None:
    tab.type_prompt("a red elephant moving right on a black background")
    expect(tab.page.locator(".behind u").first).to_have_text("elephant")
    expect(tab.page.locator("#prompt-counter")).to_contain_text("tokens")
    tab.type_prompt("a red circle " * 200)
    expect(tab.page.locator("#prompt-counter")).to_have_class("counter over")
    cut = tab.page.locator(".behind s").first.inner_text()
    assert 0 < len(cut) < len("a red circle " * 200)


def test_words_of_the_demo_are_written_by_a_tap(tab: Tab) -> None:
    tab.page.get_by_text("Words this model knows").click()
    for word in ("red", "circle"):
        tab.page.locator(".chips").get_by_role("button", name=word, exact=True).click()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value("red circle")


def test_image_is_dropped_dragged_and_moved_by_keys(tab: Tab) -> None:
    tab.set_length(49)
    tab.drop(".track", "photo.png", PHOTO, (0.5, 0.5))
    expect(item(tab)).to_have_attribute("title", "photo.png, 96×160\nframe 25, strength 1")
    expect(item(tab).locator("img")).to_have_js_property("complete", True)
    box = item(tab).bounding_box()
    assert box is not None
    mouse = tab.page.mouse
    mouse.move(box["x"] + 10, box["y"] + 10)
    mouse.down()
    mouse.move(box["x"] + 90, box["y"] + 12, steps=5)
    mouse.up()
    frame = int(item(tab).locator(".frame").inner_text())
    assert 30 <= frame <= 44
    item(tab).focus()
    tab.page.keyboard.press("ArrowLeft")
    expect(item(tab).locator(".frame")).to_have_text(str(frame - 1))
    tab.page.keyboard.press("End")
    expect(item(tab).locator(".frame")).to_have_text("end")
    tab.set_length(97)
    expect(item(tab).locator(".frame")).to_have_text("end")  # it stays there
    tab.page.keyboard.press("Escape")
    item(tab).click()
    tab.page.get_by_label("Strength: 1 keeps it as it is").fill("0.5")
    tab.page.get_by_role("button", name="Close", exact=True).click()
    tab.type_prompt(PROMPT)
    (condition,) = asked(tab)["conditions"]
    assert (condition["frame"], condition["strength"]) == (-1, 0.5)
    item(tab).focus()
    tab.page.keyboard.press("Delete")
    expect(tab.page.locator(".item")).to_have_count(0)


def test_photo_becomes_a_vertical_video(tab: Tab) -> None:
    with tab.page.expect_file_chooser() as chooser:
        tab.page.get_by_role("button", name="+ First").click()
    chooser.value.set_files({"name": "photo.png", "mimeType": "image/png", "buffer": PHOTO})
    expect(item(tab).locator(".frame")).to_have_text("start")
    expect(tab.page.get_by_label("Shape", exact=True)).to_have_value("image")  # without being told
    tab.type_prompt("an orange background")
    tab.set_length(9)
    tab.set_more("Steps", "2")
    wait_for_video(tab, submit(tab, tab.make))
    width, height = tab.evaluate(
        "() => { const v = document.querySelector('video'); return [v.videoWidth, v.videoHeight]; }"
    )
    assert width < height


def test_long_video_has_parts_whose_edges_move(tab: Tab) -> None:
    tab.type_prompt("a red circle on a black background")
    tab.page.get_by_label("Seconds", exact=True).fill("20")
    tab.page.get_by_role("button", name="+ Another prompt").click()
    tab.page.get_by_label("Then", exact=True).fill("a blue ring on a gray background")
    start = tab.page.locator(".partial .grow")
    before = start.inner_text()
    edge = tab.page.locator(".edge")
    edge.focus()
    tab.page.keyboard.press("ArrowRight")
    expect(start).not_to_have_text(before)
    bar, box = tab.page.locator(".parts").bounding_box(), edge.bounding_box()
    assert bar is not None
    assert box is not None
    mouse = tab.page.mouse
    mouse.move(box["x"] + box["width"] / 2, box["y"] + 5)
    mouse.down()
    mouse.move(bar["x"] + bar["width"] * 0.25, box["y"] + 5, steps=4)
    mouse.up()
    expect(start).to_have_text("from 5.04 s on")
    with tab.page.expect_response("**/v1/plan") as planned:
        tab.page.get_by_label("Seed", exact=True).fill("3")
    answer = planned.value.json()
    prompts = json.loads(planned.value.request.post_data or "")["prompt"].split(" | ")
    first_of_second = prompts.index("a blue ring on a gray background")
    assert answer["windows"][first_of_second][0] == 121  # the frame at 5.04 s, as the page says
    assert len(answer["prompts"]) == len(prompts)


def test_settings_of_a_video_come_back_into_the_composer(server: ServerProcess, open_tab: OpenTab) -> None:
    settings = {
        "size": "96x64",
        "num_frames": 17,
        "fps": 12,
        "seed": 9,
        "num_inference_steps": 3,
        "guidance": {"cfg_scale": 2.5, "cfg_star": True},
        "negative_prompt": "a green square",
        "decode_timestep": 0.1,
        "image_crf": 10,
        "skip_final": 1,
        "windows": {"frames": 17, "overlap": 8, "adain": 0.5},
    }
    with server.client() as client:
        video = make_video(client, **settings)
        tab = open_tab(server)
        open_newest(tab)
        expect(tab.page.locator("#stage")).to_have_attribute("data-video", video["id"])
        tab.page.get_by_role("button", name="Edit settings").click()
        expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
        again = client.get(f"/v1/videos/{submit(tab, tab.make)}").json()
        assert again["request"] == video["request"]


def test_mp4_that_is_dropped_restores_its_settings(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        image = client.post("/v1/uploads", content=PHOTO, headers={"content-type": "application/octet-stream"}).json()
        video = make_video(
            client, seed=31, num_frames=17, conditions=[{"media": image["id"], "frame": -1, "strength": 0.8}]
        )
        content = client.get(f"/v1/videos/{video['id']}/content").content
    tab = open_tab(server)
    tab.type_prompt("something else")
    tab.drop("body", "mine.mp4", content)
    tab.page.get_by_role("button", name="Restore its settings").click()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(tab.page.get_by_label("Seed", exact=True)).to_have_value("31")
    expect(tab.page.get_by_label("Frames", exact=True)).to_have_value("17")
    expect(item(tab).locator(".frame")).to_have_text("end")
    tab.page.get_by_role("button", name="Undo").first.click()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value("something else")


def test_frame_of_a_video_becomes_the_start_of_the_next(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        make_video(client, num_frames=9)
    tab = open_tab(server)
    open_newest(tab)
    tab.page.get_by_label("Use this frame in the next video").select_option("end")
    expect(item(tab).locator(".frame")).to_have_text("end")
    (condition,) = asked(tab)["conditions"]
    assert condition["media"].startswith("upload_")


def test_video_is_continued(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        video = make_video(client, num_frames=17)
    tab = open_tab(server)
    open_newest(tab)
    tab.page.get_by_role("button", name="Continue").click()
    expect(item(tab)).to_have_class("item clip")
    body = asked(tab)
    assert body["conditions"] == [{"media": video["id"], "frame": 0, "strength": 1}]
    assert (body["num_frames"], body["size"]) == (41, "64x64")


def test_gallery_is_searched_and_favourites_are_kept(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        wait_until_finished(client, create_video(client, prompt="a small yellow square on a navy background")["id"])
    tab, other = open_tab(server), open_tab(server)
    tab.page.get_by_label("Search in prompts").fill("YELLOW navy")
    expect(tab.page.locator(".tile")).to_have_count(1)
    tab.page.locator(".tile button").click()
    tab.page.get_by_role("button", name="Favourite: it never expires").click()
    expect(tab.page.locator(".tile .star")).to_be_visible()
    other.page.get_by_role("button", name="Favourites only").click()
    expect(other.page.locator(".tile")).to_have_count(1)
    tab.page.get_by_role("button", name="Copy as a command").is_hidden()
    tab.page.get_by_text("All settings").click()
    with tab.page.expect_response("**/command") as answer:
        tab.page.get_by_role("button", name="Copy as a command").click()
    assert answer.value.json()["command"].startswith("kadr generate 'a small yellow square on a navy background'")


def test_deleted_video_can_be_brought_back_for_a_while(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        for seed in range(3):
            make_video(client, seed=seed)
    tab = open_tab(server)
    expect(tab.page.locator(".tile").nth(2)).to_be_visible()
    count = tab.page.locator(".tile").count()
    tab.page.get_by_role("button", name="Select", exact=True).click()
    for number in (0, 1):
        tab.page.locator(".tile button").nth(number).click()
    tab.page.locator(".chosen").get_by_role("button", name="Delete").click()
    expect(tab.page.locator(".tile")).to_have_count(count - 2)
    tab.page.get_by_role("button", name="Undo").click()
    expect(tab.page.locator(".tile")).to_have_count(count)
    tab.page.reload()
    expect(tab.page.locator(".tile")).to_have_count(count)


@pytest.mark.parametrize("name", ["notes.txt", "broken.png"])
def test_file_that_is_no_image_or_clip_is_named_with_the_reason(tab: Tab, name: str) -> None:
    tab.drop("body", name, b"these are only words")
    expect(tab.page.locator(".toast.error")).to_contain_text(name)
    expect(tab.page.locator(".item")).to_have_count(0)


def test_two_videos_are_wiped_against_each_other(server: ServerProcess, open_tab: OpenTab) -> None:
    with server.client() as client:
        first, second = make_video(client, seed=1), make_video(client, seed=2)
    tab = open_tab(server)
    open_newest(tab)
    tab.page.get_by_role("button", name="Compare with another video").click()
    tab.page.locator(f'.tile[data-key="{first["id"]}"] button').click()
    sources = tab.page.locator(".views video").evaluate_all("(videos) => videos.map((video) => video.src)")
    assert [video["id"] in source for video, source in zip((first, second), sources, strict=True)] == [True, True]
    tab.page.get_by_label("Where one video ends").fill("30")
    assert "30%" in tab.page.locator(".views .other").evaluate("(node) => getComputedStyle(node).clipPath")
    tab.page.get_by_role("button", name="Compare with another video").click()
    expect(tab.page.locator(".views .other")).to_be_hidden()


@pytest.mark.slow
def test_self_test_shows_a_verdict_for_each_stage(tab: Tab) -> None:
    tab.page.get_by_role("button", name="About this server").click()
    tab.page.get_by_role("button", name="Self-test", exact=True).click()
    expect(tab.page.get_by_text("Everything is as it should be.")).to_be_visible()
    assert tab.page.locator(".verdicts li.pass").count() >= 8
    assert "kadr" in tab.page.get_by_label("Report").input_value()
