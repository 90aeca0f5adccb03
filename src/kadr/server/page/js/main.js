/** Puts the page together. */

import {mountBanners} from "./banner.js";
import {mountComposer} from "./composer.js";
import {takeDropsAndPastes} from "./drop.js";
import {mountGallery} from "./gallery.js";
import {mountHeader, mountTabs} from "./header.js";
import {mountQueue} from "./queue.js";
import {mountStage} from "./stage.js";
import {startSync} from "./sync.js";

/** Builds every part, and begins to follow the server. */
function start() {
	const find = (id) => document.getElementById(id);
	mountBanners(find("banners"));
	mountHeader(find("header"));
	mountTabs(find("tabs"));
	mountStage(find("stage"));
	mountComposer(find("composer"));
	mountQueue(find("queue"));
	mountGallery(find("gallery"));
	takeDropsAndPastes();
	startSync();
}

requestAnimationFrame(() => setTimeout(start)); // the frame of the page is painted first
