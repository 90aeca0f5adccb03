/** Shape and size of a video. */

const SIDE = 32; // sides are multiples of this many pixels
const MIN_SIDE = 64;

/** Aspects that the composer offers, besides the recipe's, that of the first image, and a size of one's own. */
export const ASPECTS = {
	"16:9": 16 / 9,
	"3:2": 3 / 2,
	"4:3": 4 / 3,
	"1:1": 1,
	"3:4": 3 / 4,
	"2:3": 2 / 3,
	"9:16": 9 / 16
};
/** Shares of the recipe's pixels that the composer offers. */
export const BUDGETS = [0.25, 0.5, 1, 1.5, 2];

/** Returns [width, height] of the recipe of a model, as far as it is known. */
export function recipeSize(model) {
	return parseSize(model?.recipe?.size ?? "704x480");
}

/** Returns [width, height] from "704x480", or null. */
export function parseSize(text) {
	const match = /^\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*$/i.exec(text);
	return match === null ? null : [Number(match[1]), Number(match[2])];
}

/** Returns the size with a given aspect and about so many pixels. */
export function sizeFor(aspect, area) {
	const snap = (side) => Math.max(MIN_SIDE, Math.round(side / SIDE) * SIDE);
	return [snap(Math.sqrt(area * aspect)), snap(Math.sqrt(area / aspect))];
}

/** Returns the field `size` of a draft, or null for that of the recipe. */
export function findSize({aspect, area, size}, model) {
	if (aspect === "own") return size;
	if (aspect === "image") return "auto";
	if (aspect === "recipe" && area === null) return null;
	const [width, height] = recipeSize(model);
	const pixels = area ?? width * height;
	return sizeFor(ASPECTS[aspect] ?? width / height, pixels).join("x");
}
