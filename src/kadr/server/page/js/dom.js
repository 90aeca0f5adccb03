/** Builds nodes, keeps lists of them, and formats figures. Foreign text only ever becomes a text node. */

import {icon} from "./icons.js";

let numFields = 0;

/** Returns an element. props: attributes; "on..." are listeners; true is an attribute without a value. */
export function h(tag, props = {}, ...children) {
	const node = document.createElement(tag);
	for (const [name, value] of Object.entries(props)) setProp(node, name, value);
	node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
	return node;
}

/** Sets an attribute, a listener, or the property that a field shows. */
function setProp(node, name, value) {
	if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
	else if (name === "value" || name === "checked") node[name] = value;
	else if (value === false || value === null || value === undefined) node.removeAttribute(name);
	else node.setAttribute(name, value === true ? "" : value);
}

/** Sets the text of a node, unless it has it: a reader of the screen is not told twice. */
export function setText(node, text) {
	if (node.textContent !== text) node.textContent = text;
}

/** Shows or hides a node. */
export function show(node, isShown) {
	node.hidden = !isShown;
}

/** Sets a field's value, unless its user is typing a figure there, which may not be complete. */
export function setValue(field, value) {
	const text = String(value ?? "");
	const isTyping = document.activeElement === field && field.matches("input");
	if (field.value !== text && !isTyping) field.value = text;
}

/** Returns a button with an icon, whose name is told and shown on hover. */
export function iconButton(name, label, onclick, props = {}) {
	return h("button", {type: "button", class: "icon", "aria-label": label, title: label, onclick, ...props}, icon(name));
}

/** Returns a button with text. */
export function button(text, onclick, props = {}) {
	return h("button", {type: "button", onclick, ...props}, text);
}

/** Returns a field with its label. field: may be a row whose first field it is. */
export function labelled(text, field) {
	const target = field.matches("input, select, textarea") ? field : field.querySelector("input, select, textarea");
	target.id ||= `field-${(numFields += 1)}`;
	return h("div", {class: "field"}, h("label", {for: target.id}, text), field);
}

/** Returns a select. options: [value, text] each. */
export function select(options, props = {}) {
	const node = h("select", props);
	setOptions(node, options);
	return node;
}

/** Replaces the options of a select where they differ, and keeps what is chosen. */
export function setOptions(node, options) {
	const key = JSON.stringify(options);
	if (node.dataset.options === key) return;
	node.dataset.options = key;
	const {value} = node;
	node.replaceChildren(...options.map(([name, text]) => h("option", {value: name}, text)));
	if (options.some(([name]) => name === value)) node.value = value;
}

/** Makes the children of a node those of a list, in its order: kept by key, made and removed as needed. */
export function syncList(container, items, keyOf, create, update) {
	const known = new Map([...container.children].map((node) => [node.dataset.key, node]));
	let place = container.firstElementChild;
	for (const item of items) {
		const key = String(keyOf(item));
		let node = known.get(key);
		if (node === undefined) {
			node = create(item);
			node.dataset.key = key;
		}
		known.delete(key);
		if (node === place) place = place.nextElementSibling;
		else container.insertBefore(node, place);
		update?.(node, item);
	}
	for (const node of known.values()) node.remove();
}

/** Returns a function that runs when it has not been called for some milliseconds. */
export function debounce(run, ms) {
	let timer = 0;
	return (...values) => {
		clearTimeout(timer);
		timer = setTimeout(run, ms, ...values);
	};
}

/** Tells people who cannot see the screen. */
export function announce(text) {
	setText(document.getElementById("live"), text);
}

/** Formats a time: "46 s", "3 min", "2 h 5 min". */
export function formatTime(seconds) {
	if (seconds < 99.5) return `${Math.max(1, Math.round(seconds))} s`;
	const minutes = Math.round(seconds / 60);
	if (minutes < 100) return `${minutes} min`;
	const hours = Math.floor(minutes / 60);
	return hours < 24 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** Formats bytes: "880 MB", "5.1 GB". */
export function formatBytes(bytes) {
	if (bytes < 1e9) return `${Math.max(1, Math.round(bytes / 1e6))} MB`;
	return `${(bytes / 1e9).toFixed(bytes < 1e11 ? 1 : 0)} GB`;
}

/** Formats the memory of a server: "5.1 of 23 GB"; "23 GB" where its use is unknown. */
export function formatMemory({memory_used_bytes: used, memory_bytes: total}) {
	return used === null ? formatBytes(total) : `${formatBytes(used).replace(/ GB$/, "")} of ${formatBytes(total)}`;
}

/** Formats a number of seconds of video: "5", "5.04". */
export function formatLength(seconds) {
	return String(Math.round(seconds * 100) / 100);
}

/** Formats a time of day, with the date where it was not today. */
export function formatDate(seconds) {
	const date = new Date(seconds * 1000);
	const time = date.toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"});
	if (date.toDateString() === new Date().toDateString()) return `today ${time}`;
	if (date.toDateString() === new Date(Date.now() - 864e5).toDateString()) return `yesterday ${time}`;
	return `${date.toLocaleDateString()} ${time}`;
}

/** Returns the prompt of a video as a title: of windows, each prompt once. */
export function titleOf({prompt, request}) {
	const parts = request?.windows ? prompt.split("|").map((part) => part.trim()) : [prompt];
	return parts.filter((part, index) => part !== parts[index - 1]).join(" → ") || "(no prompt)";
}

/** Returns "1 video" or "3 videos". */
export function count(number, noun) {
	return `${number} ${noun}${number === 1 ? "" : "s"}`;
}
