/** Plays a video in a loop, frame by frame where that is wanted, and beside another one. */

import {formatLength, h, iconButton, select, setText, show} from "./dom.js";
import {icon} from "./icons.js";
import {showSigned} from "./images.js";
import {LAST, useFrame} from "./media.js";
import {store} from "./state.js";

/** Builds the player. */
export function mountPlayer() {
	const video = h("video", {
		class: "view",
		loop: true,
		muted: true,
		playsinline: true,
		preload: "auto",
		tabindex: "0",
		"aria-label": "The video; arrow keys show it frame by frame"
	});
	video.muted = true;
	const other = h("video", {
		class: "view other",
		loop: true,
		muted: true,
		playsinline: true,
		"aria-label": "The video to compare with"
	});
	other.muted = true;
	const wipe = h("input", {
		type: "range",
		class: "wipe",
		min: 0,
		max: 100,
		value: 50,
		"aria-label": "Where one video ends and the other begins"
	});
	const left = h("span", {class: "half"});
	const right = h("span", {class: "half right"});
	const views = h("div", {class: "views"}, video, other, left, right, wipe);
	const play = iconButton("play", "Play or pause", () => toggle());
	const scrub = h("input", {type: "range", class: "grow", min: 0, step: 1, "aria-label": "Frame"});
	const place = h("output", {class: "place"});
	const use = select(
		[
			["", "use this frame as"],
			["0", "start"],
			[String(LAST), "end"],
			["key", "keyframe"]
		],
		{"aria-label": "Use this frame in the next video"}
	);
	const controls = h(
		"div",
		{class: "row controls"},
		play,
		iconButton("back", "Frame before", () => step(-1)),
		iconButton("forward", "Next frame", () => step(1)),
		scrub,
		place,
		use
	);
	const node = h("div", {class: "player"}, views, controls);
	const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
	let shown = null;

	const frame = () => Math.min(shown.num_frames - 1, Math.max(0, Math.floor(video.currentTime * shown.fps + 1e-3)));

	function toggle() {
		if (video.paused) video.play().catch(() => {});
		else video.pause();
	}

	function step(by) {
		video.pause();
		seek((frame() + by + shown.num_frames) % shown.num_frames);
	}

	function seek(number) {
		video.currentTime = (number + 0.5) / shown.fps; // the middle of a frame is on neither of its edges
		if (!other.hidden) other.currentTime = Math.min(video.currentTime, other.duration || 0);
	}

	function tell() {
		if (shown === null) return;
		const number = frame();
		scrub.value = number;
		setText(place, `frame ${number + 1} of ${shown.num_frames}`);
		node.dataset.frame = number;
	}

	/** Follows the frames while they play: `timeupdate` comes four times a second only. */
	function follow() {
		tell();
		if (!video.paused && !node.hidden)
			(video.requestVideoFrameCallback ?? requestAnimationFrame).call(
				video.requestVideoFrameCallback ? video : window,
				follow
			);
	}

	scrub.addEventListener("input", () => {
		video.pause();
		seek(Number(scrub.value));
	});
	for (const event of ["seeked", "loadeddata", "timeupdate"]) video.addEventListener(event, tell);
	for (const event of ["play", "pause"]) {
		video.addEventListener(event, () => {
			play.replaceChildren(icon(video.paused ? "play" : "pause"));
			if (!other.hidden) video.paused ? other.pause() : other.play().catch(() => {});
			follow();
		});
	}
	video.addEventListener("click", toggle);
	video.addEventListener("keydown", (event) => {
		const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
		if (by !== undefined) step(by);
		else if (event.key === " ") toggle();
		else return;
		event.preventDefault();
	});
	use.addEventListener("change", () => {
		if (use.value !== "") useFrame(shown.id, frame(), use.value === "key" ? null : Number(use.value), shown.prompt);
		use.value = "";
	});
	wipe.addEventListener("input", () => views.style.setProperty("--wipe", `${wipe.value}%`));

	node.show = (next) => {
		if (next.id !== shown?.id) {
			scrub.max = next.num_frames - 1;
			showSigned(video, next, "url");
			node.title = `${next.size.replace("x", "×")}, ${formatLength(next.num_frames / next.fps)} s`;
			if (!calm) video.play().catch(() => {});
		}
		shown = next;
		const second = store.get().videos.get(store.get().compared);
		const isCompared = second !== undefined && second.id !== next.id && second.status === "completed";
		show(other, isCompared);
		for (const part of [wipe, left, right]) show(part, isCompared);
		if (isCompared) {
			showSigned(other, second, "url");
			setText(left, `seed ${next.seed}`);
			setText(right, `seed ${second.seed}`);
			other.currentTime = video.currentTime;
			if (!video.paused) other.play().catch(() => {});
		} else other.pause();
		tell();
	};
	node.stop = () => {
		if (shown !== null) video.pause();
	};
	return node;
}
