/** The gallery: finished videos, newest first, that play under the pointer. */

import {button, count, debounce, formatDate, h, iconButton, setText, show, syncList, titleOf} from "./dom.js";
import {showSigned} from "./images.js";
import {deleteVideos, downloadVideo} from "./jobs.js";
import {store} from "./state.js";
import {selectVideo} from "./tabs.js";
import {loadMore, searchGallery} from "./sync.js";

const HOVER_MS = 120;
const AT_ONCE = 3; // tiles that are built in a frame: more would stop the scrolling
const NEAR_PIXELS = 900; // from the end of the list: time to load more
const chosen = new Set();

/** Builds the gallery. */
export function mountGallery(root) {
	const search = h("input", {
		type: "search",
		placeholder: "search",
		"aria-label": "Search in prompts",
		oninput: debounce(() => searchGallery({query: search.value}), 250)
	});
	const stars = iconButton("star", "Favourites only", () => searchGallery({favorite: !store.get().gallery.favorite}));
	const choose = button("Select", () => setChoosing(!isChoosing), {class: "small"});
	const bar = h("div", {class: "row wrap chosen"});
	const list = h("ul", {class: "tiles"});
	const note = h("p", {class: "hint"});
	const end = h("div", {class: "end"});
	root.append(
		h("div", {class: "row between wrap"}, h("h2", {}, "Gallery"), h("span", {class: "row"}, search, stars, choose)),
		bar,
		list,
		note,
		end
	);
	let isChoosing = false;

	function setChoosing(isOn) {
		isChoosing = isOn;
		chosen.clear();
		root.classList.toggle("choosing", isOn);
		setText(choose, isOn ? "Done" : "Select");
		update();
	}

	function update() {
		const {gallery, videos, selected} = store.get();
		stars.setAttribute("aria-pressed", String(gallery.favorite));
		const all = gallery.ids.map((id) => videos.get(id)).filter(Boolean);
		const shown = all.slice(0, list.children.length + AT_ONCE);
		if (shown.length < all.length) requestAnimationFrame(update);
		syncList(
			list,
			shown,
			(video) => video.id,
			(video) => createTile(video, () => isChoosing, update),
			(tile, video) => tile.update(video, selected)
		);
		const isSearch = gallery.query !== "" || gallery.favorite;
		setText(
			note,
			shown.length > 0
				? ""
				: gallery.isLoading
					? "Loading"
					: isSearch
						? "No video like that."
						: "Finished videos come here."
		);
		const picked = [...chosen].map((id) => videos.get(id)).filter(Boolean);
		show(bar, isChoosing);
		bar.replaceChildren(
			h("span", {}, `${count(picked.length, "video")} selected`),
			button("Download", () => picked.forEach((video, index) => setTimeout(downloadVideo, 300 * index, video)), {
				class: "small",
				disabled: picked.length === 0
			}),
			button("Delete", () => (deleteVideos(picked), setChoosing(false)), {
				class: "small danger",
				disabled: picked.length === 0
			})
		);
	}
	store.subscribe(["gallery", "videos", "selected"], update);
	const lookFurther = () =>
		end.getBoundingClientRect().top < innerHeight + NEAR_PIXELS && end.offsetParent !== null && loadMore();
	let isAsked = false;
	const askOnce = () => {
		if (!isAsked) requestAnimationFrame(() => ((isAsked = false), lookFurther()));
		isAsked = true;
	};
	document.addEventListener("scroll", askOnce, {capture: true, passive: true}); // of whichever part scrolls
	store.subscribe(["gallery"], askOnce);
}

function createTile({id}, isChoosing, onChoice) {
	const image = h("img", {alt: "", loading: "lazy", decoding: "async"});
	const text = h("span", {class: "caption"});
	const facts = h("span", {class: "facts hint"});
	const star = h("span", {class: "star", "aria-hidden": "true"}, "★");
	const open = h("button", {type: "button", class: "open"}, image, star, text, facts);
	const tile = h("li", {class: "tile"}, open);
	const find = () => store.get().videos.get(id);
	open.addEventListener("click", () => {
		if (!isChoosing()) return selectVideo(id);
		chosen.has(id) ? chosen.delete(id) : chosen.add(id);
		return onChoice();
	});
	playOnHover(open, find);
	let shown = null; // nothing is done for a tile whose video, and what else it shows, is as it was
	tile.update = (video, selected) => {
		const key = [video.seq, id === selected, isChoosing() && chosen.has(id), isChoosing()].join();
		if (key === shown) return;
		shown = key;
		showSigned(image, video, "thumbnail_url");
		setText(text, titleOf(video));
		setText(facts, `${formatDate(video.created_at)} · ${video.seconds} s`);
		show(star, video.favorite === true);
		if (isChoosing()) open.setAttribute("aria-pressed", String(chosen.has(id)));
		else open.removeAttribute("aria-pressed");
		tile.classList.toggle("selected", id === selected);
	};
	return tile;
}

/** Plays a video while the pointer rests on it. */
function playOnHover(open, find) {
	let timer = 0;
	let player = null;
	open.addEventListener("pointerenter", (event) => {
		if (event.pointerType !== "mouse") return;
		timer = setTimeout(() => {
			const video = find();
			if (video === undefined) return;
			player = h("video", {loop: true, playsinline: true, "aria-hidden": "true"});
			player.muted = true;
			showSigned(player, video, "url");
			open.append(player);
			player.play().catch(() => {});
		}, HOVER_MS);
	});
	open.addEventListener("pointerleave", () => {
		clearTimeout(timer);
		player?.remove();
		player = null;
	});
}
