/** Icons, as strokes on a field of 24 by 24. */

const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
	play: "M8 5v14l11-7z",
	pause: "M8 5v14M16 5v14",
	back: "M15 5l-7 7 7 7",
	forward: "M9 5l7 7-7 7",
	up: "M5 15l7-7 7 7",
	down: "M5 9l7 7 7-7",
	close: "M6 6l12 12M18 6L6 18",
	add: "M12 5v14M5 12h14",
	star: "M12 3.5l2.6 5.4 5.9.8-4.3 4.1 1 5.9-5.2-2.8-5.2 2.8 1-5.9L3.500 9.700l5.900-.8z",
	download: "M12 4v11M7 11l5 5 5-5M5 20h14",
	trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
	again: "M19 12a7 7 0 1 1-2.200-5.100M17 3v4h-4",
	dice: "M5 5h14v14H5zM9 9h.01M15 9h.01M12 12h.01M9 15h.01M15 15h.01",
	search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12M15.500 15.500L20 20",
	menu: "M5 7h14M5 12h14M5 17h14",
	copy: "M9 9h10v11H9zM5 15V4h10",
	undo: "M9 6L4 11l5 5M4 11h9a6 6 0 0 1 6 6",
	grip: "M9 6h.01M9 12h.01M9 18h.01M15 6h.01M15 12h.01M15 18h.01",
	compare: "M12 4v16M4 7h5v10H4zM15 7h5v10h-5"
};

/** Returns an icon, which is only there for the eye. */
export function icon(name) {
	const svg = document.createElementNS(SVG, "svg");
	svg.setAttribute("viewBox", "0 0 24 24");
	svg.setAttribute("aria-hidden", "true");
	const path = document.createElementNS(SVG, "path");
	path.setAttribute("d", PATHS[name]);
	svg.append(path);
	return svg;
}
