/** The prompt: grows as one types; what the model will not read is grey, a word that it does not know underlined. */

import {button, h, setText, setValue, show, syncList} from "./dom.js";
import {draft, setDraft} from "./draft.js";
import {isEmptyServer} from "./welcome.js";
import {store} from "./state.js";

const EXAMPLES = [
	"A red fox runs through fresh snow between dark pines at dawn. It turns its head towards the camera, breath steaming in the cold air, then leaps over a fallen trunk. Low sun from the left, long blue shadows, shallow depth of field, handheld tracking shot.",
	"Waves roll slowly onto a black sand beach under a heavy grey sky. Foam spreads, thins and draws back over wet pebbles. The camera glides low along the waterline. Soft, even light; fine spray in the air; calm and steady.",
	"An elderly watchmaker in a leather apron leans over a brass pocket watch and lifts a tiny gear with tweezers. Dust drifts through a beam of warm window light. Close-up, the background of shelves and clocks out of focus, the camera still."
];
const DEMO_EXAMPLES = [
	"a red circle moving right on a black background",
	"a large green triangle growing on a navy background",
	"a small yellow ring falls quickly on a gray background"
];

/** Builds a field for a prompt. get, set: its text in the draft. check: returns what the plan says about it. */
export function promptField({id, label, get, set, check, rows = 3}) {
	const behind = h("div", {class: "behind", "aria-hidden": "true"});
	const note = h("p", {class: "hint"});
	const counter = h("span", {class: "counter", id: `${id}-counter`});
	const field = h("textarea", {
		id,
		rows,
		maxlength: 20000,
		spellcheck: "true",
		"aria-describedby": `${id}-counter`,
		placeholder: "What does the video show?",
		oninput: () => (set(field.value), mark()),
		onscroll: () => (behind.scrollTop = field.scrollTop)
	});
	const node = h(
		"div",
		{class: "prompt"},
		h("div", {class: "row between"}, h("label", {for: id}, label), counter),
		h("div", {class: "layers"}, behind, field),
		note
	);

	function mark() {
		const found = check();
		const current = found !== null && found.text === field.value.trim() ? found : null;
		behind.replaceChildren(...marked(field.value, current));
		if (current?.tokens > 1) setText(counter, `${current.tokens}/${current.max_tokens} tokens`);
		else if (field.value.trim() === "") setText(counter, "");
		const unknown = current?.unknown_words ?? [];
		setText(note, unknown.length > 0 ? `This model does not know: ${unknown.slice(0, 8).join(", ")}.` : "");
		counter.classList.toggle("over", current !== null && current.tokens > current.max_tokens);
	}
	node.update = () => (setValue(field, get()), mark());
	return node;
}

/** Returns nodes with a text whose unknown words are underlined, and whose end is grey where it is not read. */
function marked(text, found) {
	if (found === null) return [text];
	const start = text.length - text.trimStart().length;
	const end = found.num_characters_read === null ? text.length : start + utf16(text, start, found.num_characters_read);
	const unknown = new Set(found.unknown_words);
	const words = unknown.size === 0 ? [text.slice(0, end)] : text.slice(0, end).split(/([\w'-]+)/u);
	const nodes = words.map((word) => (unknown.has(word) ? h("u", {}, word) : word));
	return [...nodes, h("s", {}, text.slice(end)), "\n"];
}

/** Returns the length, in the units of strings, of so many characters of a text. */
function utf16(text, start, characters) {
	return [...text.slice(start)].slice(0, characters).join("").length;
}

/** Builds the prompt, with the words that the demo model knows and prompts to try. */
export function mountPrompt(root) {
	const field = promptField({
		id: "prompt",
		label: "Prompt",
		get: () => draft.get().prompt,
		set: (prompt) => setDraft({prompt}),
		check: () => store.get().plan?.answer?.prompts?.[0] ?? null
	});
	const examples = h("div", {class: "examples"});
	const words = h("details", {class: "words"}, h("summary", {}, "Words this model knows"), h("div", {class: "chips"}));
	root.append(field, examples, words);
	draft.subscribe(["prompt"], field.update);
	store.subscribe(["plan"], field.update);
	const update = () => {
		const {model} = store.get();
		showExamples(examples, model);
		show(words, model?.words != null);
		syncList(
			words.lastChild,
			model?.words ?? [],
			(word) => word,
			(word) => button(word, () => addWord(word), {class: "chip"})
		);
	};
	store.subscribe(["model", "gallery", "videos"], update);
	draft.subscribe(["prompt"], update);
}

function showExamples(root, model) {
	const isShown = model !== null && isEmptyServer() && draft.get().prompt === "";
	show(root, isShown);
	if (!isShown) return;
	const prompts = model.words != null ? DEMO_EXAMPLES : EXAMPLES;
	syncList(
		root,
		prompts,
		(prompt) => prompt,
		(prompt) => button(prompt, () => setDraft({prompt}), {class: "example", title: "Write this prompt"})
	);
}

function addWord(word) {
	const {prompt} = draft.get();
	setDraft({prompt: `${prompt}${prompt === "" || prompt.endsWith(" ") ? "" : " "}${word}`});
	document.getElementById("prompt").focus();
}
