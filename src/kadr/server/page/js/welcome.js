/** What a first visit shows. */

import {store} from "./state.js";

/** Tells whether the server has no video yet, as far as is known. */
export function isEmptyServer() {
	const {gallery, videos, connection} = store.get();
	return connection === "live" && videos.size === 0 && !gallery.isLoading && gallery.query === "" && !gallery.favorite;
}
