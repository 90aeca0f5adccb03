/** The composer: what a person says about the video they want. */

import {h} from "./dom.js";
import {mountMake} from "./make.js";
import {mountMore} from "./more.js";
import {mountParts} from "./parts.js";
import {mountPlan} from "./plan.js";
import {mountPrompt} from "./prompt.js";
import {mountShape} from "./shape.js";
import {mountSource} from "./source.js";
import {mountTimeline} from "./timeline.js";

/** Builds the composer. */
export function mountComposer(root) {
	const places = [mountPrompt, mountTimeline, mountSource, mountParts, mountShape, mountMore].map((mount) => {
		const place = h("div", {class: "part"});
		mount(place);
		return place;
	});
	const foot = h("div", {class: "foot"});
	mountPlan(foot);
	mountMake(foot);
	root.append(h("div", {class: "scroll"}, places), foot);
}
